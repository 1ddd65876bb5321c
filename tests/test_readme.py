"""README's tree and the files that it captions."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]


def captions(room):
    """The lines of the tree about one room."""
    return re.search(rf"^  {room}/ .*\n(?:   .*\n)*", TREE, re.MULTILINE)[0]


def test_every_file_and_every_room_has_a_caption():
    package = ROOT / "sppo_jax"
    for file in package.glob("[a-z]*.py"):
        assert re.search(rf"\b{file.name}  +\w", TREE), file
    for room in {path.parent for path in package.glob("*/__init__.py")} - {package / "tiny"}:
        shown = captions(room.name)
        for file in room.glob("[a-z]*.py"):
            assert re.search(rf"\b{file.stem}\b", shown), file
