"""Who may do what."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from pydantic import ValidationError

from cluster.gateway.auth import Callers, hash_of, new_token, read
from cluster.gateway.config import GatewayConfig
from protocols.client import Credentials, connect
from protocols.errors import BadInput, Denied, Unauthenticated, Unavailable
from protocols.policy import PolicyService
from protocols.service import CheckpointRequest, Empty
from tests.cluster.gateway.scripted import ANSWERS, Scripted, a_gateway, a_handle, a_request, raw

ENTRY = f"- {{{{name: a, sha256: '{'0' * 64}', roles: [{{}}]}}}}\n"
ROLES = {"asker": ["infer"], "trainer": ["infer", "train"], "boss": ["admin"]}


def token_file(folder: Path, names: dict[str, Any] | None = None) -> Path:
    """Tokens are `NAME-token`."""
    file = folder / "tokens.yaml"
    entries = [
        {"name": name, "sha256": hash_of(f"{name}-token"), "roles": roles}
        for name, roles in (ROLES if names is None else names).items()
    ]
    file.write_text(yaml.safe_dump(entries))
    return file


def caller(gateway: Any, name: str) -> PolicyService:
    return connect(gateway.address, PolicyService, credentials=Credentials(token=f"{name}-token"), tries=1)


async def test_roles(tmp_path: Path) -> None:
    file = token_file(tmp_path)
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, tokens=str(file)) as gateway:
        assert await caller(gateway, "asker").sample(a_request()) == ANSWERS["sample"]
        assert await caller(gateway, "trainer").sample(a_request()) == ANSWERS["sample"]
        await caller(gateway, "trainer").save(CheckpointRequest(path="a"))
        await caller(gateway, "boss").drain(Empty())
        with pytest.raises(Denied, match=r"asker may not call PolicyService\.save: it needs the role train"):
            await caller(gateway, "asker").save(CheckpointRequest(path="a"))
        with pytest.raises(Denied, match=r"boss may not call PolicyService\.sample: it needs the role infer"):
            await caller(gateway, "boss").sample(a_request())
        for name in ("stranger", ""):
            with pytest.raises(Unauthenticated, match="authorization: the token is not known"):
                await caller(gateway, name).sample(a_request())
        with pytest.raises(Unauthenticated, match="authorization: expected `Bearer TOKEN`"):
            await connect(gateway.address, PolicyService).sample(a_request())
        async with raw(gateway) as send:
            for value in (
                "Bearer",
                "Bearer ",
                "Basic asker-token",
                "asker-token",
                hash_of("asker-token"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await send("PolicyService/Health", metadata=(("authorization", value),))
                assert failed.value.code() == grpc.StatusCode.UNAUTHENTICATED
            await send("PolicyService/Health", metadata=(("authorization", "bearer asker-token"),))


async def test_tokens_change_while_serving(tmp_path: Path) -> None:
    file = token_file(tmp_path)
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, tokens=str(file)) as gateway:
        await caller(gateway, "asker").sample(a_request())
        token_file(tmp_path, {"somebody-new": ["infer"]})
        await caller(gateway, "somebody-new").sample(a_request())
        with pytest.raises(Unauthenticated):
            await caller(gateway, "asker").sample(a_request())
        # A file that is half written locks nobody out.
        for broken in ("- name: [", "- name: x", ""):
            file.write_text(broken)
            await caller(gateway, "somebody-new").sample(a_request())
        file.unlink()
        await caller(gateway, "somebody-new").sample(a_request())
        token_file(tmp_path)
        await caller(gateway, "asker").sample(a_request())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: a b", r"tokens: .*tokens.yaml: 0.name: got 'a b'"),
        ("- {name: a, sha256: abc, roles: []}", r"tokens: .*0.sha256: got 'abc'"),
        (
            f"- {{name: a, sha256: {'0' * 64}, roles: [king]}}",
            r"tokens: .*0.roles.0: got 'king'; input should be 'infer'",
        ),
        (ENTRY.format("infer") * 2, "two callers have the same name or token"),
        ("a: [", "tokens: cannot read"),
        ("just text", r"tokens: .*input should be a valid list"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokens: cannot read .*nowhere"):
        Callers(str(tmp_path / "nowhere"))


def test_new_tokens_are_known_by_their_hash_alone(tmp_path: Path) -> None:
    one, entry = new_token("me", ["infer"])
    other, second = new_token("you", ["train"])
    assert one not in entry and len(one) >= 40 and one != other
    (tmp_path / "tokens").write_text(entry + second)
    assert Callers(str(tmp_path / "tokens")).of(f"Bearer {other}").name == "you"
    with pytest.raises(BadInput, match="name: got 'a b'"):
        new_token("a b", ["infer"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"address": "0.0.0.0:1"}, "0.0.0.0 is reached from other machines; set tls"),
        ({"address": "example.org:1"}, "set tls, or plaintext_beyond_loopback=true"),
        ({"address": "[::]:1", "plaintext_beyond_loopback": True}, "set tokens, or tls.client_ca"),
        ({"address": "0.0.0.0:1", "tls": {"certificate": "a", "key": "b"}}, "set tokens, or tls.client_ca"),
        ({"address": "localhost"}, "expected HOST:PORT"),
        ({"address": "localhost:99999"}, "expected HOST:PORT"),
    ],
)
def test_what_others_reach_is_closed_to_strangers(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GatewayConfig.model_validate(given)


@pytest.mark.parametrize(
    "given",
    [
        {"address": "[::1]:0"},
        {"address": "localhost:0"},
        {"address": "127.0.0.9:0"},
        {"address": "0.0.0.0:1", "plaintext_beyond_loopback": True, "tokens": "file"},
        {"address": "0.0.0.0:1", "tls": {"certificate": "a", "key": "b", "client_ca": "c"}},
    ],
)
def test_what_may_be_opened(given: dict[str, Any]) -> None:
    assert GatewayConfig.model_validate(given).address == given["address"]


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates that it signed for the gateway and for a caller."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2")
        openssl(*signed, "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem")
    return folder


def tls(folder: Path, **more: str) -> dict[str, str]:
    return {"certificate": str(folder / "server.pem"), "key": str(folder / "server.key"), **more}


async def test_tls(certificates: Path, tmp_path: Path) -> None:
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, tls=tls(certificates)) as gateway:
        assert gateway.address.startswith("grpcs://")
        trusting = Credentials(root_certificate=str(certificates / "ca.pem"))
        assert await connect(gateway.address, PolicyService, credentials=trusting).info(Empty()) == ANSWERS["info"]
        for address, credentials in ((gateway.address, None), (gateway.address.replace("grpcs", "grpc"), trusting)):
            with pytest.raises(Unavailable):
                await connect(address, PolicyService, credentials=credentials, tries=1).info(Empty())
        absent = connect(gateway.address, PolicyService, credentials=Credentials(root_certificate="nothing.pem"))
        with pytest.raises(BadInput, match=r"credentials: .*nothing.pem"):
            await absent.info(Empty())


async def test_mutual_tls(certificates: Path, tmp_path: Path) -> None:
    given = tls(certificates, client_ca=str(certificates / "ca.pem"))
    async with a_gateway({"policy": a_handle(Scripted())}, tmp_path, tls=given) as gateway:
        root = str(certificates / "ca.pem")
        known = Credentials("", root, str(certificates / "client.pem"), str(certificates / "client.key"))
        assert await connect(gateway.address, PolicyService, credentials=known).info(Empty()) == ANSWERS["info"]
        stranger = connect(gateway.address, PolicyService, credentials=Credentials(root_certificate=root), tries=1)
        with pytest.raises(Unavailable):
            await stranger.info(Empty())


async def test_what_keeps_a_gateway_from_starting(certificates: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gateway.tls: .*nothing"):
        async with a_gateway({}, tmp_path, tls={"certificate": "nothing", "key": "nothing"}):
            pass
    async with a_gateway({}, tmp_path) as gateway:
        with pytest.raises(BadInput, match=r"gateway.address: cannot listen at 127.0.0.1"):
            async with a_gateway({}, tmp_path, address=f"127.0.0.1:{gateway.port}"):
                pass


def test_the_address_of_a_client_has_a_form() -> None:
    for address in ("127.0.0.1:1", "http://a:1", "grpc://a", "grpc://a:b", ""):
        with pytest.raises(BadInput, match=r"address: got .* expected grpc://HOST:PORT"):
            connect(address, PolicyService)


def test_a_token_that_no_header_can_carry_is_named() -> None:
    for token in ("a b", "line\n", "ü"):
        with pytest.raises(BadInput, match=r"credentials\.token: expected printable ASCII"):
            connect("grpc://127.0.0.1:1", PolicyService, credentials=Credentials(token=token))


def test_the_command_prints_a_token_and_its_entry(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch.py", "token", "me", "infer", "train"], capture_output=True, text=True, check=True
    )
    token = done.stderr.strip().rpartition(" ")[2]
    file = tmp_path / "tokens.yaml"
    file.write_text(done.stdout)
    found = Callers(str(file)).of(f"Bearer {token}")
    assert (found.name, found.roles) == ("me", ["infer", "train"])
