"""Loading a graph into onnxruntime."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from qlora_runtime.errors import ModelLoadError

_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def open_session(graph: Path, threads: int | None) -> ort.InferenceSession:
    """The graph, to run on `threads` CPU threads (None: as many as onnxruntime finds best).

    Raises:
        ModelLoadError: onnxruntime refuses the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what goes wrong is raised; nothing is printed beside it
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except _LOAD_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"onnxruntime {ort.__version__} cannot load {graph}: {reason}") from error


def read_adapter(file: Path) -> dict[str, ort.OrtValue]:
    """The weights of an onnxruntime adapter file (.onnx_adapter), by the names of the graph's inputs.

    Raises:
        ModelLoadError: onnxruntime cannot read the file.
    """
    try:
        adapter = ort.AdapterFormat.read_adapter(str(file))
        # Copies: in older onnxruntime (1.23) the weights lie in the adapter's memory and do not keep it.
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.array(weight.numpy()))
            for name, weight in adapter.get_parameters().items()
        }
    except (*_LOAD_ERRORS, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"onnxruntime {ort.__version__} cannot read {file}: {reason}") from error
