"""kafka-python's clients, so that a failure leaves nothing behind and says its reason, and a silence comes to an end.

Faults of kafka-python 3.0.12 are mended here, without which a daemon cannot live through an outage: a client whose
construction fails leaves a thread and sockets behind, and every connection that fails leaves one; a TLS handshake that
nobody answers is waited for without end; and what a broker says just before it hangs up (that a password is wrong) is
thrown away.
"""

import ssl
from collections.abc import Callable
from typing import Any, TypeVar

from kafka.errors import KafkaConnectionError
from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket, create_connection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

T = TypeVar("T")


def make(kind: Callable[..., T], **options: Any) -> T:
    """A producer, a consumer or an admin client. Where it fails, its threads and sockets are gone."""
    made: list[_Client] = []

    def client(**configs: Any) -> _Client:
        made.append(_Client(**configs))
        return made[-1]

    try:
        return kind(**options, kafka_client=client)
    except BaseException:
        for one in made:
            one.close()
        raise


class _Client(KafkaNetClient):  # type: ignore[misc]
    def __init__(self, **configs: Any) -> None:
        net = NetworkSelector(**configs)
        super().__init__(net, _Manager(net, **configs))


class _Manager(KafkaConnectionManager):  # type: ignore[misc]
    async def _build_transport(self, node: Any, timeout_at: float) -> "_Transport":
        options = self.config["socket_options"]
        sock = await create_connection(self._net, node.host, node.port, options, _Socket.URL, timeout_at)
        transport: _Transport | None = None
        try:
            if self.ssl_enabled:
                transport = _TlsTransport(self._net, sock, node.host, ssl_context=self.config["ssl_context"])
                await transport.shake_hands(timeout_at)
            else:
                transport = _Transport(self._net, sock, node.host)
        except BaseException as error:
            (sock.close if transport is None else transport._close)()
            if isinstance(error, Exception):
                raise KafkaConnectionError(f"Handshake failed: {error}") from error
            raise
        return transport


class _Socket(KafkaNetSocket):  # type: ignore[misc]
    """No proxy. The library takes a kind of its own by a scheme of URLs."""

    SCHEMES = ("direct",)
    URL = "direct://"

    async def sock_connect(self, net: Any, sock: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return await super().sock_connect(net, sock, *arguments, **more)
        except BaseException:
            sock.close()
            raise


class _Transport(KafkaTCPTransport):  # type: ignore[misc]
    def _sock_recv(self) -> tuple[bytes, BaseException | None]:
        data, error = super()._sock_recv()
        return (data, None) if data else (data, error)  # an end that follows data is found by the next read


class _TlsTransport(_Transport, KafkaSSLTransport):  # type: ignore[misc]
    async def shake_hands(self, timeout_at: float) -> None:
        while True:
            try:
                return self._sock.do_handshake()  # type: ignore[no-any-return]
            except ssl.SSLWantReadError:
                await self._net.wait_read(self._sock, timeout_at)
            except ssl.SSLWantWriteError:
                await self._net.wait_write(self._sock, timeout_at)
