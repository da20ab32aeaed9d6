"""pytest --run-slow: also the tests that take minutes, which are otherwise left out."""


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also learn the laptop's headline, one seed")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, and needs --run-slow")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--run-slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
