"""A model as a graph that needs no vitft: ONNX and torch.export files, written, opened, measured.

The graph takes pixels, either uint8 [B, H, W, 3] as a decoder gives them or float32 [B, 3, H, W]
already normalised, and gives the logits and the calibrated probabilities; B is free. Decoding and
resizing stay with the caller: ONNX's antialiased resize is not Pillow's, by which the model was
measured, and moves probabilities a hundred times farther than the 1e-4 within which everything
exported here must agree (`tools/bench/resize.py`).

onnx, onnxscript and onnxruntime come with the extra `onnx`, and are imported in this room alone.
"""

import copy
import importlib.util
import io as streams
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft import io
from vitft.errors import MachineError, VitftError, WeightsError
from vitft.inputs import TransformSpec, normalise

META = "vitft"  # key of our metadata in either file
PT2_META = "vitft.json"
GRAPH_LIMIT = 2_000_000_000  # bytes of one ONNX file; protobuf holds no more
OUTPUTS = ("logits", "probabilities")

Floats = NDArray[np.float32]
Runner = Callable[[Tensor], tuple[Floats, Floats]]  # uint8 [n, 3, S, S] -> logits, probabilities


class Deployed(nn.Module):
    """A network with what belongs before and after it, as one module to trace.

    Args:
        net: Gives logits [B, C].
        transform: Its size, mean and standard deviation are used.
        temperature: Divides the logits.
        uint8: Whether normalising is inside.
        half: The network computes in float16; inputs and outputs stay as they are.
    """

    def __init__(
        self,
        net: nn.Module,
        transform: TransformSpec,
        temperature: float,
        *,
        uint8: bool,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).cpu().eval()
        if half:
            self.net.half()
        self.uint8, self.half_precision, self.temperature = uint8, half, temperature
        for name in ("mean", "std"):
            values = [255 * v for v in getattr(transform, name)]
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 [B, H, W, 3] or float32 [B, 3, H, W] -> logits [B, C], probabilities [B, C]."""
        x = images
        if self.uint8:
            mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
            x = (x.permute(0, 3, 1, 2).to(torch.float32) - mean) / std
        if self.half_precision:
            x = x.half()
        logits = self.net(x).float()
        return logits, (logits / self.temperature).softmax(dim=1)


def fed(pixels: Tensor, transform: TransformSpec, *, uint8: bool) -> Tensor:
    """Uint8 [n, 3, S, S] -> what a graph takes."""
    return pixels.permute(0, 2, 3, 1).contiguous() if uint8 else normalise(pixels, transform)


def _example(transform: TransformSpec, *, uint8: bool) -> Tensor:
    """Two images, since a batch of one would be taken for a constant."""
    height, width = transform.size
    return fed(torch.zeros(2, 3, height, width, dtype=torch.uint8), transform, uint8=uint8)


# --- ONNX ----------------------------------------------------------------------------------------


def write_onnx(
    module: Deployed, transform: TransformSpec, file: Path, metadata: Mapping[str, str]
) -> None:
    """Writes one file by torch's dynamo exporter.

    Args:
        module: On the CPU.
        transform: Of the input.
        file: Replaced whole.
        metadata: Text that travels in the file.

    Raises:
        MachineError: `env.extra`: a package of the extra is missing.
        VitftError: `export.too_large`.
    """
    require_onnx()
    size = sum(p.numel() * p.element_size() for p in module.state_dict().values())
    if size > GRAPH_LIMIT:
        text = f"{size:,} bytes of weights > {GRAPH_LIMIT:,} that one ONNX file holds"
        raise VitftError.of("export.too_large", file, text, "export as pt2 or hf instead")
    with _hushed(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (_example(transform, uint8=module.uint8),),
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            verbose=False,
        )
    proto = cast(Any, program).model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    io.write_bytes(file, proto.SerializeToString())


def quantise(source: Path, target: Path) -> None:
    """An ONNX file with int8 weights, activations quantised as they come (onnxruntime).

    Each output of a matrix has a scale of its own: with one for all, probabilities of a ViT-S/14
    on 82 flowers moved by up to 0.19 to 0.26 rather than 0.06 to 0.08, for 0.8 % less on disk.
    """
    require_onnx()
    with _hushed():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with io.staged_file(target) as temp:
            # Convolutions have no int8 kernel on many CPUs; the matrix products are the bulk.
            quantize_dynamic(
                str(source),
                str(temp),
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
            )


def open_onnx(
    file: Path, transform: TransformSpec, *, uint8: bool, threads: int | None = None
) -> Runner:
    """The file in onnxruntime on the CPU.

    Raises:
        MachineError: `env.extra`.
        WeightsError: `export.unreadable`.
    """
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has an exception for each of its states
        raise _unreadable(file, error) from None

    def run(pixels: Tensor) -> tuple[Floats, Floats]:
        images = fed(pixels, transform, uint8=uint8).numpy()
        logits, probabilities = session.run(list(OUTPUTS), {"images": images})
        return logits, probabilities

    return run


def require_onnx() -> None:
    """The extra's packages are here.

    Raises:
        MachineError: `env.extra`.
    """
    names = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        text = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise MachineError.of("env.extra", "ONNX", text, "pip install 'vitft[onnx]'")


# --- torch.export --------------------------------------------------------------------------------


def write_pt2(
    module: Deployed, transform: TransformSpec, file: Path, metadata: Mapping[str, str]
) -> None:
    """Writes a torch.export archive; arguments as for `write_onnx`."""
    batch = torch.export.Dim.DYNAMIC
    with _hushed(), torch.no_grad():
        program = torch.export.export(
            module,
            (_example(transform, uint8=module.uint8),),
            dynamic_shapes={"images": {0: batch}},
        )
        buffer = streams.BytesIO()
        torch.export.save(ep=program, f=buffer, extra_files={PT2_META: metadata[META]})
    io.write_bytes(file, buffer.getvalue())


def open_pt2(file: Path, transform: TransformSpec, *, uint8: bool) -> Runner:
    """The archive in torch on the CPU.

    Raises:
        WeightsError: `export.unreadable`.
    """
    try:
        with _hushed():
            network = torch.export.load(str(file)).module()
    except Exception as error:  # an archive of anyone's making
        raise _unreadable(file, error) from None

    @torch.no_grad()
    def run(pixels: Tensor) -> tuple[Floats, Floats]:
        logits, probabilities = network(fed(pixels, transform, uint8=uint8))
        return logits.numpy(), probabilities.numpy()

    return run


def _unreadable(file: Path, error: Exception) -> WeightsError:
    text = f"cannot be opened ({type(error).__name__}: {str(error)[:200]})"
    fault = WeightsError.of("export.unreadable", file, text, "export the model again")
    return cast(WeightsError, fault)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keeps the exporters' talk about themselves off the screen; their errors still come."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
