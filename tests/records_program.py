"""Builds listed classes of a library with an audit hook, and prints what happened as JSON.

A process of its own, since audit hooks cannot be removed: python records_program.py LIBRARY [NAME…]
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from record_models import WIDE, every_record

from cocktailsdk.errors import AdapterError
from cocktailsdk.models import rebuilt

FAMILIES = ("socket.", "subprocess.", "urllib.", "http.client.", "shutil.", "pty.", "webbrowser.")
EVENTS = ("pickle.find_class", "builtins.input", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
seen: list[str] = []
watching = False


def watch(event: str, args: tuple[object, ...]) -> None:
    if not watching:
        return
    if event in EVENTS or event.startswith(FAMILIES):
        seen.append(f"{event} {args}"[:200])
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITING and "__pycache__" not in str(args[0]):
        seen.append(f"wrote {args[0]}")


def main(adapter: str, only: list[str]) -> None:
    global watching
    importlib.import_module(adapter)
    sys.addaudithook(watch)
    built, failed, before = [], {}, set(sys.modules)
    for said in every_record(adapter):
        name = said["record"].get("class") or said["record"]["name"]
        if not known(adapter, name) or (only and name not in only):
            continue
        watching = True
        # Large ones are built without memory, as bundles are at first.
        try:
            for device in ("meta", "cpu") if adapter == "transformers" else ("meta",):
                rebuilt(said, device, bounds=WIDE)
            built.append(name)
        except AdapterError as error:  # older versions of timm cannot build some without memory
            failed[name] = str(error)
        watching = False
    imported = {m.partition(".")[0] for m in set(sys.modules) - before}
    imported -= sys.stdlib_module_names
    json.dump({"built": built, "failed": failed, "seen": seen, "imported": sorted(imported)}, sys.stdout)


def known(adapter: str, name: str) -> bool:
    """Whether the installed version has a class."""
    if adapter == "timm":
        import timm

        return timm.is_model(name)
    if adapter == "torchvision":
        from torchvision import models

        return name in models.list_models()
    return hasattr(sys.modules["transformers"], name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
