"""Ready-made networks of the papers, built from this library's layers and estimators."""

from lowbit_ext.models.vae import BernoulliVAE

__all__ = ["BernoulliVAE"]
