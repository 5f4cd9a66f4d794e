"""Every error that vqcodec raises on purpose, sorted by whose fault it is.

::

    VqcodecError
        BitstreamError (also a ValueError)    the .vq2 file
            NotVq2Error
            UnsupportedVersionError
            DamagedError
            ModelMismatchError
            LimitError
        ImageError (also a ValueError)        the image to encode
            TruncatedError
        WeightsError                          the installation
        DeviceError                           the machine
        WorkerError                           the machine, of a process that died
        ClusterError                          the Ray cluster
        StorageError                          the network, or who owns the storage
        FileError                             a file, with its name in front
        UsageError (also a ValueError)        the caller: options out of range or in contradiction

A message says what is wrong, both values, and what to do. It does not name the file: whoever opened the file
puts the name in front, and then it is a FileError.
"""


class VqcodecError(Exception):
    """Anything that is not a bug: one ``except`` for all errors below."""


class BitstreamError(VqcodecError, ValueError):
    """The .vq2 file cannot be decoded here, for one of the reasons below."""


class NotVq2Error(BitstreamError):
    """The caller's fault: these bytes are not a .vq2 file."""


class UnsupportedVersionError(BitstreamError):
    """Nobody's fault: the file is written in a version of the format that this release does not know."""


class DamagedError(BitstreamError):
    """The fault of the disk, the network or the program that wrote it: the file is damaged or truncated."""


class ModelMismatchError(BitstreamError):
    """Nobody's fault: the file was written with other weights than those loaded."""


class LimitError(BitstreamError):
    """The decoder's choice: the image is larger than the caller or the memory allows. The file may be in order."""


class ImageError(VqcodecError, ValueError):
    """The input image's fault: it is not an image, truncated, or of a kind that is not supported."""


class TruncatedError(ImageError):
    """The pixels of the input image end early, or are damaged; the beginning of its file is in order."""


class WeightsError(VqcodecError):
    """The installation's fault: the weights file is missing or unreadable."""


class DeviceError(VqcodecError):
    """The machine's fault, or the caller's: the requested device does not exist or cannot be used."""


class WorkerError(VqcodecError):
    """The machine's fault: the process that worked on a file has died."""


class ClusterError(VqcodecError):
    """The cluster's fault: it cannot be reached, or cannot do the work."""


class StorageError(VqcodecError):
    """The fault of the network, of who owns the storage, or of the URL."""


class FileError(VqcodecError):
    """Any of the others, or the file system's, with the name of the file in front."""


class UsageError(VqcodecError, ValueError):
    """The caller's fault: options out of range, or inputs, outputs and options that contradict each other."""
