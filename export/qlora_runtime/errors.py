"""Everything that can go wrong with a bundle, one class per reason.

Each message says what was found, what is allowed, and what to do about it. `BundleError` catches them all.
"""


class BundleError(Exception):
    """The root of every error this package raises on purpose."""


class MissingFileError(BundleError):
    """The bundle, or a file that the bundle must have, is not there."""


class HashMismatchError(BundleError):
    """A file's bytes are not those the manifest promises."""


class UnexpectedFileError(BundleError):
    """A file lies in the bundle that the manifest does not know."""


class ForeignFileError(BundleError):
    """A file is intact, but belongs to another bundle: it disagrees with the rest of this one."""


class UnsafePathError(BundleError):
    """A path in the manifest leads out of the bundle."""


class FormatError(BundleError):
    """A JSON file of the bundle does not have the shape the format asks for."""


class UnknownFormatError(FormatError):
    """The manifest names a format that this version does not read."""


class ModelLoadError(BundleError):
    """onnxruntime cannot load the graph, or its inputs and outputs are not those of the format."""


class ModelOutputError(BundleError):
    """The model answered with numbers that are not finite."""


class WrongTaskError(BundleError):
    """The bundle's model was trained for another task than the one asked for."""


class TokenizerError(BundleError):
    """tokenizer.json cannot be read, or speaks of tokens the model does not have."""


class ChatTemplateError(BundleError):
    """There is no chat template, or it refused or failed to render the messages."""


class PaddingError(BundleError):
    """An attention mask is not right-padded."""


class PromptTooLongError(BundleError):
    """A prompt does not fit in the model's context."""


class ArgumentError(BundleError):
    """An argument has a value, type or shape that is not allowed."""
