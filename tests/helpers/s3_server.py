"""An S3 server on this machine (moto's), on a free port, with credentials where the tools of S3 look for them."""

import contextlib
import os
import threading
from collections.abc import Iterator
from unittest import mock

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

SECRET = "wJalr-not-a-real-secret-XUtnFEMI"
BUCKET = "logits"


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Serve S3 with an empty bucket; yield the environment that leads there, which is also this process's."""
    application, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def answer(environ, start_response):
        with one_at_a_time:  # moto looks and then puts, in two steps; S3 does so in one
            return application(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "AKIA-OF-A-TEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield environment
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
