// Talks to the server that this page came from. What a model writes is only ever put in as text.

const KEPT = ["temperature", "top_p", "max_tokens", "system"];
const part = (id) => document.getElementById(id);
let model = null;
let turns = [];
let running = null; // an AbortController, while something is written

function say(text, bad = false) {
  part("status").textContent = text;
  part("status").classList.toggle("bad", bad);
}

function headers() {
  const key = part("key").value.trim();
  const said = { "Content-Type": "application/json" };
  return key ? { ...said, Authorization: `Bearer ${key}` } : said;
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    part("settings").open = true;
    part("key").focus();
    throw new Error("This server asks for a key; give it under Settings.");
  }
  if (!response.ok) throw new Error(await refusal(response));
  model = (await response.json()).data[0];
  part("model").textContent = model.id;
  document.title = model.id;
  if (localStorage.getItem("max_tokens") === null) {
    part("max_tokens").value = Math.min(256, Math.floor(model.max_model_len / 2));
  }
  const plain = model.chat === null;
  document.body.classList.toggle("plain", plain);
  part("said-label").textContent = plain ? "Text to continue" : "Message";
  part("send").textContent = plain ? "Continue" : "Send";
  part("fresh").textContent = plain ? "New text" : "New chat";
  part("hint").textContent = plain
    ? "Control and Enter continue the text, Escape stops."
    : "Enter sends, Shift and Enter begin a line, Escape stops.";
}

function number(id) {
  const { value, validity } = part(id);
  if (!validity.valid) throw new Error(`${part(id).labels[0].firstChild.data.trim()} is out of its range.`);
  return value === "" ? undefined : Number(value);
}

function asked(rest) {
  const how = { temperature: number("temperature"), top_p: number("top_p") };
  return { model: model.id, stream: true, max_tokens: number("max_tokens"), ...how, ...rest };
}

// The events of a stream, as objects.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// Calls `take` with each new piece of text; returns why the text ended.
async function write(path, body, take) {
  running = new AbortController();
  part("send").disabled = true;
  part("stop").disabled = false;
  part("talk").setAttribute("aria-busy", "true"); // read out when it is whole
  say("Writing …");
  let finish = null;
  try {
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      take(choice.delta ? choice.delta.content ?? "" : choice.text);
      finish = choice.finish_reason ?? finish;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    finish = "stopped";
  } finally {
    running = null;
    part("send").disabled = false;
    part("stop").disabled = true;
    part("talk").removeAttribute("aria-busy");
  }
  return finish;
}

function bubble(role, text) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const who = document.createElement("h2");
  who.textContent = role === "user" ? "You" : model.id;
  const said = document.createElement("p");
  said.textContent = text;
  turn.append(who, said);
  part("talk").append(turn);
  part("talk").scrollTop = part("talk").scrollHeight;
  return turn;
}

async function chat(text) {
  const talk = turns; // of this chat, even if another is begun meanwhile
  const system = part("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  const earlier = model.chat === "turns" ? talk : []; // a template of one turn takes no others
  const own = { role: "user", content: text };
  const body = asked({ messages: [...before, ...earlier, own] });
  const bubbles = [bubble("user", text), bubble("assistant", "")];
  const place = bubbles[1].querySelector("p");
  part("said").value = "";
  try {
    const finish = await write("v1/chat/completions", body, (piece) => {
      const view = part("talk");
      const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
      place.append(piece); // a text node, whatever it looks like
      if (atEnd) view.scrollTop = view.scrollHeight;
    });
    talk.push(own, { role: "assistant", content: place.textContent });
    report(finish);
  } catch (error) {
    if (!place.textContent) {
      bubbles.forEach((turn) => turn.remove());
      part("said").value = text; // to be sent again
    }
    throw error;
  }
}

async function complete(text) {
  const field = part("said");
  const finish = await write("v1/completions", asked({ prompt: text }), (piece) => {
    field.value += piece;
    field.scrollTop = field.scrollHeight;
  });
  report(finish);
}

function report(finish) {
  const why = { length: "The tokens are used up.", stopped: "Stopped." };
  say(why[finish] ?? "");
}

async function send() {
  const text = part("said").value;
  if (running || (!text.trim() && !document.body.classList.contains("plain"))) return;
  try {
    if (model === null) await findModel();
    await (model.chat === null ? complete(text) : chat(text));
  } catch (error) {
    say(error.message, true);
  }
  if (!part("settings").contains(document.activeElement)) part("said").focus();
}

function keepSettings() {
  for (const id of KEPT) localStorage.setItem(id, part(id).value);
  sessionStorage.setItem("key", part("key").value); // for this tab only
}

for (const id of KEPT) part(id).value = localStorage.getItem(id) ?? part(id).value;
part("key").value = sessionStorage.getItem("key") ?? "";
part("settings").addEventListener("change", keepSettings);
part("key").addEventListener("change", () => start());
part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
part("said").addEventListener("keydown", (event) => {
  const plain = document.body.classList.contains("plain");
  const wanted = plain ? event.ctrlKey || event.metaKey : !event.shiftKey;
  if (event.key !== "Enter" || !wanted || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
part("stop").addEventListener("click", () => running?.abort());
part("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  part("talk").replaceChildren();
  part("said").value = "";
  say("");
  part("said").focus();
});

async function start() {
  try {
    await findModel();
    say("");
    part("said").focus();
  } catch (error) {
    say(error.message, true);
  }
}

start();
