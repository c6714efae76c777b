"""export: compressed model → files a runtime loads. One file per format."""

from collections.abc import Callable, Mapping

from attar.export import attar_folder, gguf_model, onnx_model
from attar.export.pieces import Content

FORMATS: dict[str, Callable[..., Mapping[str, Content]]] = {
    "attar_folder": attar_folder.file_contents,
    "gguf_model": gguf_model.file_contents,
    "onnx_model": onnx_model.file_contents,
}

FUSED_ROLES: dict[str, tuple[tuple[str, ...], ...]] = {
    # All keep every tensor apart, with a treatment of its own.
    "attar": (),
    "gguf": (),
    "onnx": (),
}
"""Form to the roles that its runtimes read as one weight; see `plan.fuse.groups_of`."""
