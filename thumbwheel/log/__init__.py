"""The event log: a small port, and what implements it."""

from thumbwheel.log.port import Appended, Log, Message, Record, message_of
from thumbwheel.log.sqlite import SqliteLog

__all__ = ["Appended", "Log", "Message", "Record", "SqliteLog", "message_of"]
