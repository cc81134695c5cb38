"""A Kafka cluster on loopback, from an unpacked release: for the demo, and for tests that end it in every way."""

import base64
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from thumbwheel import process
from thumbwheel.errors import ThumbwheelError

_TEMPLATE = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners={listeners}
advertised.listeners={advertised}
controller.listener.names=CONTROLLER
listener.security.protocol.map={protocols}
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor={copies}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={copies}
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""


class Broker:
    """One process of the cluster. It may be killed, paused and started again on its data."""

    def __init__(self, home: Path, directory: Path, node: int, port: int, properties: str, heap: str) -> None:
        self.node = node
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.output = directory / f"broker{node}.log"
        self.properties = directory / f"broker{node}.properties"
        self.properties.write_text(properties)
        self._home = home
        self._heap = heap
        self._process: subprocess.Popen[bytes] | None = None

    def format(self, cluster: str, *arguments: str) -> None:
        """Make its data directory, once."""
        program = str(self._home / "bin/kafka-storage.sh")
        # With `=`: an id may begin with a dash.
        command = [program, "format", f"--cluster-id={cluster}", f"--config={self.properties}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ThumbwheelError(f"kafka-storage.sh failed: {done.stdout}{done.stderr}")

    def start(self) -> None:
        """Start it; `ready` says when it takes requests."""
        self.output.write_bytes(b"")
        environment = {"KAFKA_HEAP_OPTS": self._heap, "LOG_DIR": str(self.output.parent)}
        with self.output.open("ab") as output:
            self._process = process.start(
                [str(self._home / "bin/kafka-server-start.sh"), str(self.properties)], environment, output
            )

    def ready(self) -> bool:
        """Whether it said that it is up. Raises ThumbwheelError where it ended."""
        if self._process is None or self._process.poll() is not None:
            raise ThumbwheelError(f"broker {self.node} ended:\n{self.output.read_text(errors='replace')[-2000:]}")
        return b"Kafka Server started" in self.output.read_bytes()

    def signal(self, number: signal.Signals) -> None:
        """To the Java process: SIGKILL, SIGSTOP, SIGCONT."""
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number is signal.SIGKILL:
            self._process.wait()

    def stop(self) -> None:
        """Politely; nothing of it is left."""
        if self._process is not None:
            process.stop(self._process, 15.0)
            self._process = None


class Cluster:
    """Brokers that are their own controllers. A context manager: it starts them, and stops them at the end."""

    def __init__(
        self,
        directory: Path,
        brokers: int = 1,
        extra: Mapping[str, str] | None = None,
        secure_protocol: str = "",
        format_arguments: tuple[str, ...] = (),
        heap: str = "-Xmx512m -Xms128m",
    ) -> None:
        """`secure_protocol` (SSL, SASL_SSL, …) adds a listener SECURE on `secure_port`, set up by `extra` properties.

        Raises ThumbwheelError where `$KAFKA_HOME` is no release of Kafka.
        """
        home = os.environ.get("KAFKA_HOME", "")
        if not home or not (Path(home) / "bin/kafka-server-start.sh").is_file():
            raise ThumbwheelError(
                "$KAFKA_HOME has to name an unpacked release of Apache Kafka (kafka.apache.org/downloads; it needs "
                f"Java 17), or give the address of a running cluster. It is: {home or 'not set'}"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._format_arguments = format_arguments
        self._cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        ports = free_ports(3 * brokers)
        voters = ",".join(f"{node + 1}@127.0.0.1:{ports[3 * node]}" for node in range(brokers))
        self.brokers: list[Broker] = []
        self.secure_port = ports[2]
        for index in range(brokers):
            control, plain, secure = ports[3 * index : 3 * index + 3]
            advertised = f"PLAINTEXT://127.0.0.1:{plain}"
            protocols = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"
            if secure_protocol:
                advertised += f",SECURE://localhost:{secure}"
                protocols += f",SECURE:{secure_protocol}"
            properties = _TEMPLATE.format(
                node=index + 1,
                voters=voters,
                listeners=f"{advertised.replace('localhost', '127.0.0.1')},CONTROLLER://127.0.0.1:{control}",
                advertised=advertised,
                protocols=protocols,
                data=directory / f"data{index + 1}",
                copies=min(3, brokers),
            )
            properties += "".join(f"{name}={value}\n" for name, value in (extra or {}).items())
            self.brokers.append(Broker(Path(home), directory, index + 1, plain, properties, heap))
        self.bootstrap = ",".join(broker.address for broker in self.brokers)

    def __enter__(self) -> "Cluster":
        try:
            for broker in self.brokers:
                broker.format(self._cluster, *self._format_arguments)
                broker.start()
            self.until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for broker in self.brokers:
            broker.stop()

    def until_ready(self, timeout_s: float = 120.0) -> None:
        """Wait for every broker. Raises ThumbwheelError where one is not there in time."""
        deadline = time.monotonic() + timeout_s
        while not all(broker.ready() for broker in self.brokers):
            if time.monotonic() > deadline:
                raise ThumbwheelError(f"Kafka was not ready within {timeout_s:g} s")
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports
