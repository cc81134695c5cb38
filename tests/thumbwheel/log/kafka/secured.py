"""A broker behind TLS, with users, passwords, certificates and access rights."""

import shutil
import subprocess
from pathlib import Path

from tests.unavailable import unavailable
from thumbwheel.demo.broker import Cluster, free_ports

PASSWORD = "the right one"
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required"


class Secured:
    """`writer` may do everything, `stranger` nothing; the certificate `client` may do everything, too."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        certificates(directory)
        mutual = free_ports(1)[0]
        users = f'user_writer="{PASSWORD}" user_stranger="{PASSWORD}"'
        extra = {
            "ssl.keystore.type": "PKCS12",
            "ssl.keystore.location": str(directory / "server.p12"),
            "ssl.keystore.password": "secret1",
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(directory / "ca.pem"),
            "listener.name.secure.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
            "listener.name.secure.plain.sasl.jaas.config": f"{_PLAIN} {users};",
            "listener.name.secure.scram-sha-512.sasl.jaas.config": f"{_SCRAM};",
            "listener.name.mutual.ssl.client.auth": "required",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:writer;User:CN=client",
        }
        user = f"SCRAM-SHA-512=[name=writer,password={PASSWORD}]"
        self._cluster = Cluster(directory, 1, extra, "SASL_SSL", ("--add-scram", user))
        properties = self._cluster.brokers[0].properties
        lines = []
        for line in properties.read_text().splitlines():
            if line.startswith("listeners="):
                line += f",MUTUAL://127.0.0.1:{mutual}"
            elif line.startswith("advertised.listeners="):
                line += f",MUTUAL://localhost:{mutual}"
            elif line.startswith("listener.security.protocol.map="):
                line += ",MUTUAL:SSL"
            lines.append(line)
        properties.write_text("\n".join(lines) + "\n")
        self.plain = self._cluster.bootstrap
        self.secure = f"localhost:{self._cluster.secure_port}"
        self.mutual = f"localhost:{mutual}"

    def __enter__(self) -> "Secured":
        self._cluster.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.__exit__()


def certificates(directory: Path) -> None:
    """`ca.pem`, a server's key store and a client's certificate that it has signed, and a stranger's `other.pem`."""
    if shutil.which("openssl") is None:
        unavailable("needs openssl, for certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, check=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        openssl("req", "-x509", *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    (directory / "names").write_text("subjectAltName=DNS:localhost\n")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    for name in ("server", "client"):
        openssl("req", *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    store = ("-name", "server", "-passout", "pass:secret1", "-out", "server.p12")
    openssl("pkcs12", "-export", "-in", "server.pem", "-inkey", "server.key", "-certfile", "ca.pem", *store)
