"""Order among streams, for which the host waits for nothing."""

from typing import Any


class Mark:
    """A point in the work of a stream, which others can wait for; nothing is waited for before it is first set."""

    def __init__(self, device: int) -> None:
        """Make one on a device, whose number is that of the current context."""
        from cuda.core import Device

        self._event = Device(device).create_event()

    def set(self, stream: int) -> None:
        """Mark the end of what a stream, given by its handle, has to do so far."""
        _stream(stream).record(self._event)

    def await_by(self, stream: int) -> None:
        """Let what a stream is given from now on wait until the marked point is reached."""
        _stream(stream).wait(self._event)


def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)
