"""Files: opened safely, written with the mode that the umask asks for. Nothing here loads torch."""

from .files import check_regular, file_mode, open_regular, usual_folder, usual_mode

__all__ = ["check_regular", "file_mode", "open_regular", "usual_folder", "usual_mode"]
