"""Names of models and data sets that mean something on another machine."""

from pathlib import Path


def portable_name(path: str, *, short: bool = False) -> str:
    """A model's or data set's name that means something elsewhere: its Hub id, also of a Hub cache folder.

    Args:
        short: of any other path the last name alone, instead of the absolute path.
    """
    if not Path(path).exists():  # of the Hub, a pattern of data files, or deleted since
        return Path(path).name if short and path.startswith(("/", "~")) else path
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        if folder.name.startswith("models--") and folder.name.count("--") == 2 and "snapshots" in place.parts:
            return folder.name.removeprefix("models--").replace("--", "/")
    return place.name if short else str(place)
