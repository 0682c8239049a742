"""qlora-kit: fine-tune a 4- or 8-bit language model on hardware you own, ship it to a CPU as proven ONNX."""

__version__ = "0.1.0"
