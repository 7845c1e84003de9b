// The page of the server. Whatever comes from the server or the reader is set by textContent, never as markup.
"use strict";

const SHOWN = 10; // products that are asked for
const EXAMPLE = "A red striped mug";
const ATTEMPTS = 3; // to ask a busy server before the reader has to
const LONGEST_TITLE = 160; // characters of a title in a sentence
const LARGEST_KEPT_ALIVE = 60_000; // bytes of a body that is sent although the page is closed
const METHODS = {
  bm25: "words in common",
  dense: "similar meaning",
  tokens: "what the photo shows",
  endpoint: "similar meaning, by an embedding server",
};
const SAID = { text: "", like: "Like:", dislike: "Not this:" };

const HERE = location.origin + location.pathname; // an address with a password in it is refused by fetch()

const $ = (id) => document.getElementById(id);
const turns = []; // {kind: "text" | "like" | "dislike", text, id, title}, the oldest first
let items = []; // the last answer
let settings = { version: "", records: false };
let waiting = null; // the AbortController of the request that is under way
let timer = 0;
let attempts = 0;

/** What the server reads of a turn. A dislike is without the title, whose words would find more of the same. */
function content(turn) {
  if (turn.kind === "like") return `I like the ${(turn.title || turn.id).slice(0, LONGEST_TITLE)}.`;
  return turn.kind === "dislike" ? "Not that one, please." : turn.text;
}

function messages(some = turns) {
  return some.map((turn) => ({ role: "user", content: content(turn) }));
}

function voteOn(id) {
  return turns.find((turn) => turn.kind !== "text" && turn.id === id);
}

/** An answer of the server. Throws an Error with `status`, `wait` (seconds) and words for the reader. */
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(new URL(path, HERE), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("The server does not answer. Is it running?"), { status: 0 });
  }
  if (response.ok) return response;
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  throw Object.assign(new Error(await reason(response)), {
    status: response.status,
    wait: Math.min(30, Math.max(1, Number.isNaN(wait) ? 2 : wait)),
  });
}

async function reason(response) {
  if (response.status === 429) return "The server is busy.";
  if (response.status === 503) return "The server could not answer in time.";
  if (response.status === 401) return "This server asks for a token. Load the page again to enter it.";
  let body = null;
  try {
    body = await response.json();
  } catch {
    // not JSON: what a proxy answers, for example
  }
  const said = body?.error?.message ?? body?.message ?? body?.detail;
  return typeof said === "string" && said ? said : `The server answered with an error (${response.status}).`;
}

/** Asks for products for the conversation as it is now; a request that is under way is given up. */
async function ask() {
  stopWaiting();
  const mine = new AbortController();
  waiting = mine;
  document.body.dataset.state = "talk";
  $("request").placeholder = "Say more";
  $("restart").hidden = false;
  $("problem").hidden = true;
  showTurns();
  $("results").setAttribute("aria-busy", "true");
  $("status").textContent = "Looking…";
  if (!$("cards").childElementCount) showBlanks();
  $("nothing").hidden = true;
  const exclude = turns.filter((turn) => turn.kind === "dislike").map((turn) => turn.id);
  try {
    const response = await call("v1/recommend", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ conversation: messages(), k: SHOWN, exclude }),
      signal: mine.signal,
    });
    const answer = await response.json();
    if (waiting !== mine) return;
    attempts = 0;
    items = Array.isArray(answer.items) ? answer.items : [];
    finish();
    showItems();
  } catch (error) {
    if (error.name === "AbortError" || waiting !== mine) return;
    finish();
    showProblem(error);
  }
}

function finish() {
  waiting = null;
  $("results").removeAttribute("aria-busy");
  $("cards").querySelectorAll(".blank").forEach((blank) => blank.remove());
}

function stopWaiting() {
  waiting?.abort();
  waiting = null;
  clearTimeout(timer);
  $("countdown").textContent = "";
}

function showProblem(error) {
  $("status").textContent = "";
  $("problem-text").textContent = error.message ?? String(error);
  $("problem").hidden = false;
  if ((error.status === 429 || error.status === 503) && ++attempts < ATTEMPTS) {
    countDown(error.wait);
  } else {
    attempts = 0;
  }
}

function countDown(seconds) {
  if (seconds <= 0) {
    ask();
    return;
  }
  $("countdown").textContent = `Asking again in ${seconds} s`;
  timer = setTimeout(() => countDown(seconds - 1), 1000);
}

function showTurns() {
  $("turns").replaceChildren(
    ...turns.map((turn) => {
      const row = $("turn").content.cloneNode(true).firstElementChild;
      row.classList.add(turn.kind);
      row.querySelector(".said").textContent = SAID[turn.kind];
      row.querySelector(".text").textContent = turn.kind === "text" ? turn.text : turn.title || turn.id;
      const button = row.querySelector(".remove");
      button.setAttribute("aria-label", `Take back: ${SAID[turn.kind]} ${row.querySelector(".text").textContent}`);
      button.addEventListener("click", () => takeBack(turn));
      return row;
    }),
  );
  $("turns").lastElementChild?.scrollIntoView({ block: "nearest" });
}

function takeBack(turn) {
  turns.splice(turns.indexOf(turn), 1);
  $("request").focus();
  if (turns.some((left) => left.kind === "text")) ask();
  else restart();
}

/** The cards of the last answer. */
function showItems() {
  const focused = document.activeElement?.closest("#cards")
    ? { id: document.activeElement.closest(".card")?.dataset.id, name: document.activeElement.className }
    : null;
  const disliked = turns.filter((turn) => turn.kind === "dislike").length;
  $("cards").replaceChildren(...items.map(card));
  $("nothing").hidden = items.length > 0;
  $("hidden-note").hidden = disliked === 0;
  $("hidden-note").textContent =
    disliked === 1 ? "The product that you did not like is left out." : `${disliked} products that you did not like are left out.`;
  showLegend(items);
  $("status").textContent = summary();
  if (focused) {
    const same = [...$("cards").children].find((each) => each.dataset.id === focused.id);
    (same?.querySelector(`.${focused.name}`) ?? $("results-name")).focus();
  }
  const top = $("results").getBoundingClientRect().top;
  if (top < 0 || top > innerHeight / 2) $("results").scrollIntoView({ block: "start" });
}

function summary() {
  if (!items.length) return "No product";
  const count = items.length === 1 ? "1 product" : `${items.length} products`;
  return `${count}, the best: ${(items[0].title || items[0].id).slice(0, LONGEST_TITLE)}`;
}

function card(item) {
  const made = $("card").content.cloneNode(true).firstElementChild;
  const vote = voteOn(item.id);
  const name = item.title || item.id;
  made.dataset.id = item.id;
  made.classList.toggle("liked", vote?.kind === "like");
  showPhoto(made.querySelector(".photo"), item);
  made.querySelector("b").textContent = percent(item.probability);
  made.querySelector(".meter i").style.width = `${100 * Math.min(1, Math.max(0, item.probability || 0))}%`;
  const title = made.querySelector(".title");
  title.textContent = name;
  title.addEventListener("click", () => showDetail(item));
  made.querySelector(".methods").append(...methodsOf(item).map((method) => element("li", method)));
  for (const kind of ["like", "dislike"]) {
    const button = made.querySelector(`.${kind}`);
    button.setAttribute("aria-pressed", String(vote?.kind === kind));
    button.setAttribute("aria-label", `${kind === "like" ? "Like" : "Not this"}: ${name}`);
    button.addEventListener("click", () => cast(kind, item));
  }
  return made;
}

/** The methods that found a product. */
function methodsOf(item) {
  return Object.keys(item.scores ?? {}).filter((method) => typeof item.scores[method] === "number");
}

function percent(probability) {
  if (typeof probability !== "number") return "";
  return probability < 0.001 ? "< 0.1 %" : `${(100 * probability).toFixed(1)} %`;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function showPhoto(place, item) {
  const missing = () => {
    const note = element("div", "No photo");
    note.className = "missing";
    place.replaceChildren(note);
  };
  if (typeof item.photo !== "string" || !item.photo.startsWith("/photos/")) {
    missing();
    return;
  }
  const image = document.createElement("img");
  image.alt = ""; // the title stands below it
  image.decoding = "async";
  image.addEventListener("error", missing);
  place.replaceChildren(image);
  image.src = item.photo.slice(1); // relative, so that the page also works below another path
}

/** A like or dislike is a turn; the same again takes it back. */
function cast(kind, item) {
  const before = voteOn(item.id);
  if (before) turns.splice(turns.indexOf(before), 1);
  if (before?.kind !== kind) {
    const shown = items.map((each) => each.id);
    record(kind, item, shown);
    turns.push({ kind, id: item.id, title: item.title });
  }
  ask();
}

/** Tells a server that keeps conversations what was liked. */
function record(kind, item, shown) {
  if (!settings.records) return;
  const body = JSON.stringify({ conversation: messages(), candidates: shown, item: item.id, liked: kind === "like" });
  call("v1/feedback", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
    keepalive: new Blob([body]).size < LARGEST_KEPT_ALIVE, // a browser refuses to send a larger one
  }).catch(() => {}); // the conversation goes on without it
}

function showLegend(shown) {
  const names = [...new Set(shown.flatMap(methodsOf))].filter((method) => method in METHODS);
  $("legend").hidden = names.length === 0;
  $("legend").replaceChildren(
    ...names.map((method) => {
      const row = document.createElement("div");
      row.append(element("dt", method), element("dd", METHODS[method]));
      return row;
    }),
  );
}

function showBlanks() {
  $("cards").replaceChildren(
    ...Array.from({ length: SHOWN }, () => {
      const blank = element("li", "");
      blank.className = "card blank";
      blank.setAttribute("aria-hidden", "true");
      const photo = document.createElement("div");
      photo.className = "photo";
      blank.append(photo, element("span", ""), element("span", ""));
      return blank;
    }),
  );
}

function showDetail(item) {
  const dialog = $("detail");
  showPhoto(dialog.querySelector(".photo"), item);
  $("detail-title").textContent = item.title || item.id;
  dialog.querySelector(".id").textContent = `${item.id}, probability ${percent(item.probability)}`;
  const rows = methodsOf(item).map((method) => {
    const row = document.createElement("tr");
    const name = element("th", method in METHODS ? `${method} (${METHODS[method]})` : method);
    name.scope = "row";
    row.append(name, element("td", item.scores[method].toFixed(3)));
    return row;
  });
  dialog.querySelector("table").hidden = rows.length === 0;
  dialog.querySelector("tbody").replaceChildren(...rows);
  dialog.showModal();
}

function restart() {
  stopWaiting();
  finish();
  turns.length = 0;
  items = [];
  attempts = 0;
  showTurns();
  showItems();
  $("nothing").hidden = true;
  $("problem").hidden = true;
  $("status").textContent = "";
  $("restart").hidden = true;
  document.body.dataset.state = "start";
  $("request").placeholder = EXAMPLE;
  $("request").value = "";
  fit();
  $("request").focus();
}

/** Makes the text area as high as its text. */
function fit() {
  const area = $("request");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
  area.style.overflowY = area.scrollHeight > area.clientHeight ? "auto" : "hidden";
}

async function start() {
  try {
    const response = await call("page.json");
    settings = { ...settings, ...(await response.json()) };
  } catch {
    // the page works without: it cannot say whether the conversation is kept, so it says that it is
    settings.records = true;
  }
  $("version").textContent = `LaViC ${settings.version}`.trim();
  $("recorded").hidden = !settings.records;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("request").value.trim();
  if (!text) return;
  turns.push({ kind: "text", text });
  $("request").value = "";
  fit();
  attempts = 0;
  ask();
});
$("request").addEventListener("input", fit);
$("request").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("retry").addEventListener("click", () => {
  attempts = 0;
  $("request").focus();
  ask();
});
$("restart").addEventListener("click", restart);
$("detail").addEventListener("click", (event) => {
  if (event.target === $("detail")) $("detail").close(); // beside it
});
start();
$("request").placeholder = EXAMPLE;
$("request").focus();
