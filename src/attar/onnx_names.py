"""What the writer and the reader of ONNX files agree on."""

FILE = "model.onnx"
# Key of what Attar says of the model in the file's metadata.
METADATA = "attar"
# What a model that is written so can answer.
TASKS = ("classify", "embed", "regress")
