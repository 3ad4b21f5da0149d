"""The way to the object store, as a process that can be killed: `python -m tests.chaos.gateway PORT TARGET_PORT`.

It hands bytes on in both directions. Killed with -9, every request that is under way is cut, whether it was sent half,
stored without its answer, or answered half; until it is started again, connections are refused.
"""

import asyncio
import contextlib
import sys

BLOCK = 1 << 16


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(BLOCK):
            writer.write(block)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()


async def _serve(port: int, target: int) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_store, to_store = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_hand_on(reader, to_store), _hand_on(from_store, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
