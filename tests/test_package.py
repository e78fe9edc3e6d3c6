"""The package as a whole."""

import importlib
import pkgutil
import types

import lowbit_ext


def packages():
    return [getattr(lowbit_ext, name) for name in lowbit_ext.__all__
            if isinstance(getattr(lowbit_ext, name), types.ModuleType)]


def test_every_method_is_an_attribute():
    found = {name for _, name, is_package in pkgutil.iter_modules(lowbit_ext.__path__) if is_package}
    assert found == {package.__name__.removeprefix("lowbit_ext.") for package in packages()}


def test_no_module_bears_the_name_of_what_it_defines():
    """`import lowbit_ext.lowmem.ledger` would otherwise be the module or the function, by the order of imports."""
    for package in packages():
        for _, name, _ in pkgutil.iter_modules(package.__path__):
            assert name not in package.__all__, f"{package.__name__}.{name}"
            if name != "flower":  # needs an extra
                module = importlib.import_module(f"{package.__name__}.{name}")
                assert getattr(package, name, module) is module


def test_dir_names_what_is_public():
    """What is loaded when it is first asked for, too."""
    for package in packages():
        assert set(package.__all__) <= set(dir(package)), package.__name__
