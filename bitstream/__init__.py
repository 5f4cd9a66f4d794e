"""The .vq2 file: its format (`container`, FORMAT.md), its entropy coder (`rans`), the way from a file to its indices
and back (`indices`), and what can go wrong (`errors`).

Without torch: numpy, numba, constriction and safetensors. To inspect a file takes none of them.
"""
