"use strict";
// Fetches this page again and takes its <main>: there is one place that says what the state looks like.
(() => {
  const every = 3000, limit = 5000, staleAfter = 12000;
  const opened = new Map();
  let seenAt = Date.now();
  const main = () => document.querySelector("main");
  document.addEventListener("click", event => {
    const summary = event.target.closest("summary");
    if (summary) opened.set(summary.parentElement.id, !summary.parentElement.open);
  });
  function show(text) {
    const page = new DOMParser().parseFromString(text, "text/html");
    const next = page.querySelector("main");
    if (!next) throw new Error("no state in the answer");
    if (page.documentElement.dataset.build !== document.documentElement.dataset.build) {
      location.reload();
      return;
    }
    // What is being copied must not vanish; it is told to be old when it is.
    if (!getSelection().isCollapsed) return;
    seenAt = Date.now();
    for (const [id, open] of opened) {
      const details = next.querySelector("#" + CSS.escape(id));
      if (details) details.open = open;
    }
    const focused = document.activeElement?.closest("details");
    const before = main().dataset.verdict, now = next.dataset.verdict;
    main().replaceWith(document.adoptNode(next));
    if (focused) document.getElementById(focused.id)?.querySelector("summary").focus({ preventScroll: true });
    if (before !== now) document.getElementById("say").textContent = "now " + now;
    document.title = page.title;
    document.querySelector("link[rel=icon]").href = page.querySelector("link[rel=icon]").href;
  }
  async function look() {
    try {
      const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(limit) });
      if (!answer.ok) throw new Error(answer.status);
      show(await answer.text());
    } catch { /* How old the newest answer is says it all. */ }
    setTimeout(look, every);
  }
  setInterval(() => {
    const age = Date.now() - seenAt, isStale = age > staleAfter, note = document.getElementById("stale");
    if (isStale === note.hidden) {
      document.getElementById("say").textContent = isStale ? "what is shown is old" : "what is shown is new again";
      document.title = isStale ? "? " + document.title : document.title.replace("? ", "");
    }
    document.body.classList.toggle("is-stale", isStale);
    note.hidden = !isStale;
    const why = getSelection().isCollapsed ? "No answer from this monitor" : "Paused while text is selected";
    note.textContent = `${why} since ${main().dataset.now} (${Math.round(age / 1000)} s). What is shown is old.`;
  }, 1000);
  setTimeout(look, every);
})();
