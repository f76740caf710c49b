"""What a strategy computes in, per op class: the formats that a record states."""

Formats = dict[str, str]

FLOAT32: Formats = {"storage": "float32", "operands": "float32", "accumulation": "float32", "result": "float32"}


def full(operands: str) -> dict[str, Formats]:
    """Float32 in memory; `operands` of matmuls and convolutions are float32 or tf32."""
    product = FLOAT32 | {"operands": operands}
    return _table(product, FLOAT32, FLOAT32) | {"parameters": FLOAT32, "gradients and optimizer": FLOAT32}


def mixed(half: str, device_type: str, emulated: bool) -> dict[str, Formats]:
    """Autocast over float32 weights."""
    product, follows = _half(half, device_type, emulated)
    normalised = FLOAT32 if device_type == "cuda" else follows  # autocast's float32 list has them on CUDA only
    return _table(product, follows, normalised) | {"parameters": FLOAT32, "gradients and optimizer": FLOAT32}


def true_half(half: str, device_type: str, emulated: bool, *, pinned: bool) -> dict[str, Formats]:
    """Weights stored in half, without float32 masters, and no autocast.

    In bf16, gradients and AdamW's moments are stored like their weight; the fused update computes in float32 and
    rounds each once. In fp16, where the square of a gradient below 2e-4 is 0, gradients and moments are float32.
    """
    product, follows = _half(half, device_type, emulated)
    stored = {"storage": half, "operands": half, "accumulation": "float32", "result": half}
    dynamics = FLOAT32 if pinned else FLOAT32 | {"storage": half}
    return _table(product, follows, follows) | {
        "recurrence scan": dynamics,
        "parameters": {"storage": half},
        "parameters of the recurrence": {"storage": dynamics["storage"]},
        "gradients and optimizer": FLOAT32 | {"result": half} if half == "float16" else stored,
    }


def _half(half: str, device_type: str, emulated: bool) -> tuple[Formats, Formats]:
    # Stock kernels on a CPU choose by themselves; CUDA's are told, the emulation's are ours.
    known = emulated or device_type == "cuda"
    product = {"storage": half, "operands": half, "result": half}
    product["accumulation"] = "float32" if known else "chosen by torch's CPU kernels"
    as_inputs = f"{half} where an input is, else float32"
    return product, {"storage": as_inputs, "operands": as_inputs, "accumulation": "float32", "result": as_inputs}


def _table(product: Formats, elementwise: Formats, normalised: Formats) -> dict[str, Formats]:
    return {
        "matmul": product,
        "conv": product,
        "attention": product | {"scores": product["accumulation"]},
        "elementwise": elementwise,
        "norm/softmax": normalised,
        "recurrence scan": FLOAT32,
        "loss": FLOAT32,
    }
