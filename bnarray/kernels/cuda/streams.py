"""Order among streams, for which the host waits for nothing: by `cuda.core`, or by Numba where that lacks it."""

from bnarray.kernels.cuda.compiled import cuda, numba_stream


class Mark:
    """A point in the work of a stream, which others can wait for; nothing is waited for before it is first set."""

    def __init__(self, device: int) -> None:
        """Make one on a device, whose number is that of the current context."""
        try:
            from cuda.core import Device, Stream
        except ImportError:
            self._stream, self._event = None, cuda.event(timing=False)
        else:
            self._stream, self._event = Stream.from_handle, Device(device).create_event()

    def set(self, stream: int) -> None:
        """Mark the end of what a stream, given by its handle, has to do so far."""
        if self._stream is None:
            self._event.record(numba_stream(stream))
        else:
            self._stream(stream).record(self._event)

    def await_by(self, stream: int) -> None:
        """Let what a stream is given from now on wait until the marked point is reached."""
        if self._stream is None:
            self._event.wait(numba_stream(stream))
        else:
            self._stream(stream).wait(self._event)
