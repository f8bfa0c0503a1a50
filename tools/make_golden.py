"""Pack the reference tensors that the tests need: `python tools/make_golden.py REFERENCE`.

REFERENCE holds what Meta's code computed (tiny/, golden/, official/). The tiny checkpoint is copied
as it is, so that it can be run; tensors are packed with xz; of the trimmed runs the logits of every
greedy step are left out, for the prompt's own logits and the ids say the same in less room.
"""

import argparse
import lzma
import shutil
from pathlib import Path

from safetensors.torch import load_file, save

TARGET = Path(__file__).parent.parent / "tests" / "golden"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    reference = parser.parse_args().reference
    golden = reference / "golden"
    for folder in (reference / "tiny", reference / "official", golden / "images"):
        copy(folder, TARGET / folder.name)
    copy(golden / "case_images", TARGET / "case_images")
    for file in ("README.md", "images.json", "manifest.json", "tokenizer/tokenizer.json"):
        shutil.copyfile(golden / file, TARGET / Path(file).name)
    for path in sorted(golden.rglob("*.safetensors")):
        pack(path, TARGET / path.relative_to(golden))
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET}: {size / 1e6:.2f} MB")


def copy(source: Path, target: Path) -> None:
    """A folder, over what is there."""
    shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)


def pack(source: Path, target: Path) -> None:
    tensors = load_file(source)
    if source.parent.name == "trimmed":
        tensors = {name: t for name, t in tensors.items() if not name.endswith("greedy_logits")}
    target.parent.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress(save(tensors), preset=9 | lzma.PRESET_EXTREME)
    target.with_name(target.name + ".xz").write_bytes(packed)


if __name__ == "__main__":
    main()
