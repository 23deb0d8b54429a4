"""Files: opened safely, written with the mode that the umask asks for. Nothing here loads torch."""

from .modes import file_mode, usual_folder, usual_mode
from .regular import check_regular, open_regular

__all__ = ["check_regular", "file_mode", "open_regular", "usual_folder", "usual_mode"]
