"""What this machine can multiply by itself."""

import torch

# Any one of these features, named as in torch.cpu.get_capabilities(), multiplies the format without widening it.
NATIVE: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def has_half_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the half format `dtype` in hardware.

    oneDNN calls bf16 "supported" on every AVX-512 machine, where it widens to float32 in software and is many times
    slower: so the instruction sets are asked, not the library. On x86 the library must be there as well to use them.
    """
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") == "x86_64" and not torch.backends.mkldnn.is_available():
        return False
    return any(capabilities.get(feature, False) for feature in NATIVE[dtype])
