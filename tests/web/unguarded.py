"""A worker that believes its table at any time: to show that the look-up test notices. `python -m … worker ROLE`."""

from __future__ import annotations

from streams.app import App
from tidemark.main import main

if __name__ == "__main__":
    App.settled = property(lambda self: True)
    main()
