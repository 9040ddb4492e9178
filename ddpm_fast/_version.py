"""The installed version of the package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ddpm_fast")
except PackageNotFoundError:  # used from a source tree that was not installed
    __version__ = "0+unknown"
