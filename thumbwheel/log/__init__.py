"""The event log: a small port, and what implements it."""

from thumbwheel.log.open import open_log
from thumbwheel.log.port import Appended, Consumer, Log, Message, Record, Start, message_of, read_all
from thumbwheel.log.sqlite import SqliteLog

__all__ = [
    "Appended",
    "Consumer",
    "Log",
    "Message",
    "Record",
    "SqliteLog",
    "Start",
    "message_of",
    "open_log",
    "read_all",
]
