"""The .vq2 file: its format (`container`), its entropy coder (`rans`) and what can go wrong (`errors`).

numpy, constriction and the standard library only: a file can be inspected without loading a network.
"""
