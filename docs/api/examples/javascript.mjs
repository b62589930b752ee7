// Appends an event, replays everything, reads one event of the live tail.
import { readFileSync } from "node:fs";
import { request } from "node:https";
import { createInterface } from "node:readline";

const { COFFER_URL, COFFER_APP, COFFER_CA, COFFER_TOKEN } = process.env;
const events = `${COFFER_URL}/v1/apps/${COFFER_APP}/events`;
const ca = readFileSync(COFFER_CA);

// call gives the answer's stream, or fails with the problem.
function call(url, { method = "GET", headers = {}, body } = {}) {
  return new Promise((resolve, reject) => {
    const sent = request(url, { method, ca, headers: { Authorization: `Bearer ${COFFER_TOKEN}`, ...headers } }, async (answer) => {
      if (answer.statusCode < 300) return resolve(answer);
      let text = "";
      for await (const part of answer) text += part;
      reject(new Error(`${answer.statusCode} ${text}`));
    });
    sent.on("error", reject);
    sent.end(body);
  });
}

// replay yields every event; it fails when the stream was cut.
async function* replay(query = "") {
  const answer = await call(events + query, { headers: { Accept: "application/x-ndjson" } });
  for await (const line of createInterface({ input: answer })) {
    const event = JSON.parse(line);
    if (event.end) return;
    yield event;
  }
  throw new Error("cut: go on after the position of the last event");
}

// tail yields [id, event] for ever; a cut is taken up after the last id.
async function* tail(lastId) {
  for (;;) {
    try {
      const answer = await call(events, { headers: { Accept: "text/event-stream", "Last-Event-ID": lastId } });
      let name = "", data = "";
      for await (const line of createInterface({ input: answer })) {
        const at = line.indexOf(": ");
        const field = at < 0 ? line : line.slice(0, at), value = at < 0 ? "" : line.slice(at + 2);
        if (field === "id") lastId = value;
        else if (field === "event") name = value;
        else if (field === "data") data = value;
        else if (line === "") {
          if (data && !name) yield [lastId, JSON.parse(data)];
          name = data = "";
        }
      }
    } catch (error) {
      if (!("code" in error)) throw error; // not of the connection
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

const id = `javascript-${process.hrtime.bigint()}`;
let text = "";
for await (const part of await call(events, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({
    id, type: "message.sent", sender: "ann", recipient: "ben",
    data: { bodies: [{ type: "txt", msg: "Hello from JavaScript" }] },
  }),
})) text += part;
const { position } = JSON.parse(text);
console.log("stored", id, "at", position);
let count = 0;
for await (const _ of replay(`?min_position=${position}`)) count++;
console.log("replayed", count, "events");
for await (const [cursor, event] of tail(String(BigInt(position) - 1n))) {
  console.log("tail:", event.id, "next", cursor);
  process.exit(0);
}
