"""A node in a process with nothing but the library in it, as an author of a node daemon has it.

A start forks this process, and takes the longer the more it has loaded: the benchmark's own is
half as large again. Its event loop runs on between two orders, as a daemon's does.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from kvmsec import Node, definition_from


async def main() -> None:
    root, name, document = sys.argv[1:]
    definition = definition_from(json.loads(document), name, source="the benchmark")
    steps: dict[str, float] = {}
    node = Node(Path(root), on_step=lambda step: steps.update({step: time.perf_counter()}))

    async def start() -> dict[str, float]:
        begin = time.perf_counter()
        await node.start(definition)
        end = time.perf_counter()
        # The step after the reply begins with it.
        return {"reply": steps["verify"] - begin, "start": end - begin}

    async def stop() -> float:
        begin = time.perf_counter()
        await node.stop(name, force=True)
        return time.perf_counter() - begin

    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    while line := await orders.readline():
        done = await (start() if json.loads(line)["order"] == "start" else stop())
        print(json.dumps({"done": done}), flush=True)
    await node.close()


if __name__ == "__main__":
    asyncio.run(main())
