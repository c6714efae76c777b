"""export: compressed model → files a runtime loads. One file per format."""

from collections.abc import Callable, Mapping

from attar.export import attar_folder, gguf_model

FORMATS: dict[str, Callable[..., Mapping[str, bytes]]] = {
    "attar_folder": attar_folder.file_contents,
    "gguf_model": gguf_model.file_contents,
}
