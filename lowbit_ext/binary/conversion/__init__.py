"""Binary networks of other origin, made into layers of this package (convert)."""
