// A client of another language than Phalanx's: it knows NATS, JSON and docs/calls.md, and says what it finds as lines
// of JSON. usage: node client.mjs SERVER PLATFORM APP
import { connect, createInbox, headers, NoRespondersError, RequestError } from "@nats-io/transport-node";
import { Svcm } from "@nats-io/services";

const [server, platform, app] = process.argv.slice(2);
const nc = await connect({ servers: server, timeout: 10000 });
const say = (what, found) => console.log(JSON.stringify({ what, found }));

const isNobodyThere = (error) =>
  error instanceof NoRespondersError || (error instanceof RequestError && error.isNoResponders());

// The leader, as soon as there is one: nobody there, and "moved", are tried again.
async function call(method, request, deadline = Date.now() + 60000) {
  const subject = `${platform}._.api.${app}.leader.${method}`;
  for (let tries = 0; Date.now() < deadline; tries++) {
    try {
      const answer = await nc.request(subject, JSON.stringify(request), { timeout: 10000 });
      const code = answer.headers?.get("Phalanx-Error");
      if (code !== "moved") return { code, answer, tries };
    } catch (error) {
      if (!isNobodyThere(error)) throw error;
      if (tries === 0) say("nobody there yet", null);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error("no leader within a minute");
}

// The items of a stream: counted, granted as they are taken.
async function* stream(method, request, window) {
  const id = `js-${Math.random()}`;
  const inbox = createInbox();
  const messages = nc.subscribe(inbox);
  const head = headers();
  head.set("Phalanx-Call", `${id};10000`);
  head.set("Phalanx-Stream", `${window}`);
  const subject = `${platform}._.many.${app}.leader.${method}`;
  nc.publish(subject, JSON.stringify(request), { reply: inbox, headers: head });
  let count = 0;
  for await (const message of messages) {
    const said = message.headers?.get("Phalanx-Stream") ?? "";
    const [number, what] = said.split(";");
    const error = message.headers?.get("Phalanx-Error");
    if (error) throw new Error(`${error}: ${message.string()}`);
    if (Number(number) !== count + (what ? 0 : 1)) throw new Error(`item ${count + 1} was lost: ${said}`);
    if (what === "end") break;
    if (what === "alive") continue;
    count++;
    yield message.json();
    const node = message.headers.get("Phalanx-Answer").split(";")[0];
    nc.publish(`${platform}._.api.${app}.flow.${node}`, `${id};${count + window}`);
  }
  messages.unsubscribe();
}

const placed = await call("place", { items: [{ name: "apple", count: 4 }] });
say("receipt", { receipt: placed.answer.json(), waited: placed.tries > 0 });

const wrong = await call("place", { items: 7 });
say("error", {
  code: wrong.code,
  number: wrong.answer.headers.get("Nats-Service-Error-Code"),
  message: wrong.answer.headers.get("Nats-Service-Error"),
  body: wrong.answer.json(),
});

const items = [];
for await (const item of stream("count", 50, 4)) items.push(item);
say("items", items);

const stats = [];
for await (const each of await new Svcm(nc).client({ maxWait: 2000 }).stats(app)) {
  stats.push({ name: each.name, metadata: each.metadata, endpoints: each.endpoints });
}
say("stats", stats);
await nc.close();
