"""From settings to the log that they name."""

from thumbwheel.log.port import Log
from thumbwheel.log.sqlite import SqliteLog
from thumbwheel.settings import Settings


def open_log(settings: Settings) -> Log:
    """The log that every program but the gateway meets on. Raises SettingsError or LogError where it cannot be had.

    Kafka is connected to at the first use. Gateways stand before the log with an outbox of their own (`local_log`).
    """
    if settings.log.backend == "kafka":
        from thumbwheel.log.kafka.log import KafkaLog

        return KafkaLog(settings)
    return SqliteLog(settings.path(settings.log.path))
