// What moves in the app: the stage, the queue and the history, drawn from the JSON API.
"use strict";

window.litapp ??= (() => {
  const listeners = new Set();
  let source = null;
  let latest = { jobs: [] };

  // Only a window that is looked at holds a connection: browsers allow six to one address.
  function connect() {
    if (document.hidden || source) return;
    source = new EventSource("/api/v1/events");
    source.onopen = () => offline(false);
    source.onerror = () => {
      offline(true);
      if (source?.readyState !== EventSource.CLOSED) return;
      source = null;
      setTimeout(connect, 2000);
    };
    source.onmessage = (message) => {
      latest = JSON.parse(message.data);
      listeners.forEach((listener) => listener(latest.jobs));
    };
  }
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { source?.close(); source = null; } else connect();
  });
  addEventListener("pagehide", () => { source?.close(); source = null; });
  addEventListener("pageshow", connect);

  function follow(listener) {
    listeners.add(listener);
    connect();
    listener(latest.jobs);
  }

  async function call(method, path, body, type) {
    const answer = await fetch(path, { method, body, headers: type ? { "content-type": type } : {} });
    if (answer.status === 204) return null;
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.detail);
    return value;
  }

  // What cannot be shown beside its cause: one note at the foot of the window.
  const note = make("p", { className: "note", role: "alert", hidden: true });
  let fading = 0;
  function tell(text, seconds = 6) {
    // An open dialog lies above all else.
    (document.querySelector("dialog[open]") ?? document.querySelector(".gradio-container"))?.append(note);
    note.textContent = text;
    note.hidden = !text;
    clearTimeout(fading);
    if (seconds) fading = setTimeout(() => { note.hidden = true; }, seconds * 1000);
  }

  let quitting = false, away = 0;
  function offline(gone) {
    const page = document.querySelector(".gradio-container");
    clearTimeout(away);
    if (gone) {
      // A server that only restarts is back before anybody has read that it was away.
      away = setTimeout(() => {
        page?.classList.add("offline");
        tell(quitting ? "litapp has ended. You can close this window."
          : "litapp has stopped. Start it again and this page goes on where it was.", 0);
      }, quitting ? 0 : 1500);
    } else if (page?.classList.contains("offline")) {
      page.classList.remove("offline");
      tell("", 0);
      quitting = false;
      dispatchEvent(new Event("litapp-picture"));
    }
  }

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value; else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function button(text, onclick, kind = "") {
    return make("button", { type: "button", className: `quiet ${kind}`, textContent: text, onclick });
  }

  // Only a model with an encoder can start from a picture.
  let drawsFromPictures = null;
  function variations(node) {
    node.hidden = true;
    drawsFromPictures ??= call("GET", "/api/v1/model").then((model) => model.variations, () => false);
    drawsFromPictures.then((can) => { node.hidden = !can; });
    return node;
  }

  const busy = (job) => job.state === "running" || job.state === "queued";

  function duration(seconds) {
    if (seconds === null) return "";
    if (seconds < 1) return "almost done";
    if (seconds < 90) return `${Math.round(seconds)} s left`;
    return `${Math.round(seconds / 60)} min left`;
  }

  function status(job) {
    const part = job.count > 1 ? `Picture ${Math.min(job.pictures.length + 1, job.count)} of ${job.count}, ` : "";
    if (job.preparing) {
      const network = job.preparing.replaceAll("_", " ");
      return `${part}${part ? "p" : "P"}reparing the ${network} for this Mac, only this once`;
    }
    if (job.step === 0) return `${part}${part ? "r" : "R"}eading the prompt`;
    if (job.step === job.steps) return `${part}${part ? "f" : "F"}inishing`;
    const left = duration(job.eta_seconds);
    return `${part}${part ? "s" : "S"}tep ${job.step} of ${job.steps}${left ? ` · ${left}` : ""}`;
  }

  function describe({ width, height, seed, steps, guidance }) {
    return `${width} × ${height} · seed ${seed} · ${steps} steps · guidance ${guidance}`;
  }

  function cancelJob(id) {
    call("DELETE", `/api/v1/jobs/${id}`).catch((error) => tell(error.message));
  }

  // The shape of a picture, for the style sheet to fit it into its place.
  function shape(image, { width, height }) {
    image.style.setProperty("--ratio", width / height);
    image.style.setProperty("--wide", width);
  }

  function reader(trigger, kind = "") {
    const chooser = make("input", { type: "file", accept: "image/png", hidden: true, ariaLabel: "Picture" });
    chooser.onchange = () => { if (chooser.files[0]) read(chooser.files[0], trigger); chooser.value = ""; };
    return [button("Read settings from a picture…", () => chooser.click(), kind), chooser];
  }

  async function read(file, trigger) {
    try {
      trigger("select", { parameters: await call("POST", "/api/v1/parameters", file, "image/png") });
    } catch (error) {
      tell(error.message);
    }
  }

  function propose(words) {
    const prompt = document.querySelector("#prompt textarea");
    prompt.value = words;
    prompt.dispatchEvent(new Event("input", { bubbles: true }));
    prompt.focus();
  }
  const EXAMPLES = ["a red apple on a blue background", "a penguin in the snow", "a sticker of a rocket"];

  // ---------------------------------------------------------------- the stage

  function stage(element, trigger) {
    const root = element.querySelector(".stage");
    if (!root || root.childElementCount) return;
    const preview = make("img", { className: "preview", alt: "preview", hidden: true });
    const image = make("img", { className: "picture", alt: "", hidden: true });
    const empty = make("div", { className: "empty" },
      make("p", { textContent: "What would you like to see?" }),
      make("div", { className: "examples" }, ...EXAMPLES.map((words) => button(words, () => propose(words)))),
      make("div", {}, ...reader(trigger, "open")));
    const frame = make("div", { className: "frame" }, empty, image, preview);
    const bar = make("progress", { max: 1, value: 0, "aria-label": "progress" });
    const line = make("span", { className: "status", role: "status" });
    const stop = button("Cancel", () => running && cancelJob(running.id), "cancel");
    const progress = make("div", { className: "progress" }, bar, make("div", {}, line, stop));
    const problem = make("p", { className: "problem", role: "alert", hidden: true });
    const strip = make("div", { className: "strip", role: "group", ariaLabel: "Pictures of this job" });
    const words = make("p", { className: "words" });
    const facts = make("p", { className: "facts" });
    const save = make("a", { className: "quiet", textContent: "Save", download: "" });
    const actions = make("div", { className: "actions" }, save,
      variations(button("Variations", () => shown && trigger("retry", { id: shown.id, vary: true }))),
      button("Another seed", () => shown && trigger("retry", { id: shown.id })),
      button("Use these settings", () => shown && trigger("select", { id: shown.id })));
    const about = make("div", { className: "caption", hidden: true }, make("div", {}, words, facts), actions);
    root.append(frame, progress, problem, strip, about);

    let shown = null, running = null, followed = null;
    const seen = new Map();

    async function show(id, fresh = false) {
      const picture = await call("GET", `/api/v1/pictures/${id}`).catch(() => null);
      if (!picture) return;
      const next = new Image();
      next.src = picture.url;
      await next.decode().catch(() => {});
      shown = picture;
      image.src = picture.url;
      image.alt = picture.parameters.prompt;
      shape(image, picture.parameters);
      image.hidden = false;
      empty.hidden = true;
      if (fresh) { image.classList.remove("fresh"); void image.offsetWidth; image.classList.add("fresh"); }
      caption(picture.parameters);
      save.href = picture.url;
      save.download = picture.file;
      about.hidden = false;
      root.dataset.picture = id;
      for (const thumb of strip.children) thumb.classList.toggle("current", thumb.dataset.id === id);
    }

    function caption(parameters) {
      words.textContent = parameters.prompt;
      facts.textContent = describe(parameters);
    }

    function fill(job) {
      const ids = job && job.count > 1 ? job.pictures : [];
      while (strip.children.length > ids.length) strip.lastChild.remove();
      ids.forEach((id, i) => {
        if (strip.children[i]?.dataset.id === id) return;
        const thumb = make("button", { type: "button", ariaLabel: `Picture ${i + 1}`, onclick: () => show(id) },
          make("img", { src: `/api/v1/pictures/${id}/thumbnail.webp`, alt: "" }));
        thumb.dataset.id = id;
        strip.children[i] ? strip.children[i].replaceWith(thumb) : strip.append(thumb);
      });
    }

    function update(jobs) {
      running = jobs.find((job) => job.state === "running") ?? null;
      root.classList.toggle("running", running !== null);
      document.title = running ? `${running.step}/${running.steps} · litapp` : "litapp";
      if (running) {
        followed = running.id;
        problem.hidden = true;
        const total = running.count * running.steps;
        bar.max = total;
        bar.value = Math.min(total, running.pictures.length * running.steps + running.step);
        line.textContent = status(running);
        shape(preview, running);
        if (running.preview) { preview.src = running.preview; preview.hidden = false; empty.hidden = true; }
        fill(running);
        words.textContent = running.prompt;
        facts.textContent = describe(running);
        about.hidden = false;
      } else {
        if (shown) caption(shown.parameters); else about.hidden = true;
        preview.hidden = true;
        const last = jobs.find((job) => job.id === followed);
        if (last) fill(last);
      }
      for (const job of jobs) {
        const before = seen.get(job.id);
        seen.set(job.id, { state: job.state, pictures: job.pictures.length });
        if (!before) continue;
        if (job.pictures.length > before.pictures) {
          show(job.pictures.at(-1), true).then(() => { if (running?.step === 0) preview.hidden = true; });
          dispatchEvent(new Event("litapp-picture"));
        }
        if (job.state === "failed" && before.state !== "failed") {
          problem.textContent = job.error;
          problem.hidden = false;
        }
      }
      if (!running && !shown) empty.hidden = false;
    }

    call("GET", "/api/v1/pictures?limit=1").then(({ pictures: [last] }) => {
      if (last && !shown) show(last.id);
    }).catch(() => {});
    follow(update);
    dropping(root, trigger);
    addEventListener("litapp-deleted", (event) => {
      if (shown?.id !== event.detail) return;
      shown = null;
      image.hidden = about.hidden = true;
      delete root.dataset.picture;
      empty.hidden = false;
    });
  }

  // A picture dropped anywhere brings its settings along.
  function dropping(root, trigger) {
    const files = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      root.classList.add("dropping");
    });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) root.classList.remove("dropping"); });
    addEventListener("drop", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      root.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (file) read(file, trigger);
    });
  }

  // ---------------------------------------------------------------- the queue

  function queue(element) {
    const root = element.querySelector(".queue");
    if (!root || root.dataset.live) return;
    root.dataset.live = "yes";
    follow((jobs) => {
      const waiting = jobs.filter((job) => job.state === "queued");
      root.hidden = waiting.length === 0;
      const key = waiting.map((job) => job.id).join();
      if (root.dataset.key === key) return;
      root.dataset.key = key;
      const rows = waiting.map((job) => {
        const remove = button("Remove", () => cancelJob(job.id));
        remove.setAttribute("aria-label", `Remove ${job.prompt}`);
        const count = job.count > 1 ? ` × ${job.count}` : "";
        return make("li", {}, make("span", { textContent: job.prompt + count, title: job.prompt }), remove);
      });
      root.replaceChildren(make("h3", { textContent: `Waiting · ${waiting.length}` }), make("ol", {}, ...rows));
    });
  }

  // -------------------------------------------------------------- the history

  function history(element, trigger) {
    const root = element.querySelector(".history");
    if (!root || root.childElementCount) return;
    const PAGE = 48;
    const search = make("input", { type: "search", placeholder: "Search prompts", ariaLabel: "Search prompts" });
    const total = make("span", { className: "total", role: "status" });
    const folder = button("Open folder", () => trigger("expand", {}));
    const open = make("div", { className: "actions" }, ...reader(trigger), folder);
    const grid = make("div", { className: "grid" });
    const more = button("Show more", () => load(grid.childElementCount));
    const nothing = make("p", { className: "empty" });
    const dialog = make("dialog", { className: "detail", ariaLabel: "Picture", tabIndex: -1 });
    root.append(make("div", { className: "tools" }, search, total, open), grid, nothing, more, dialog);
    let asked = 0, listed = [];

    async function load(offset = 0) {
      const turn = ++asked;
      const query = new URLSearchParams({ search: search.value, limit: PAGE, offset });
      const page = await call("GET", `/api/v1/pictures?${query}`).catch(() => null);
      if (!page || turn !== asked) return;
      const cards = page.pictures.map(card);
      listed = offset ? [...listed, ...page.pictures] : page.pictures;
      if (offset) grid.append(...cards); else grid.replaceChildren(...cards);
      total.textContent = page.total === 1 ? "1 picture" : page.total ? `${page.total} pictures` : "";
      more.hidden = grid.childElementCount >= page.total;
      nothing.hidden = page.total > 0;
      nothing.textContent = search.value ? "No prompt holds these words." : "Your pictures will gather here.";
    }

    function card(picture) {
      const image = make("img", { src: picture.thumbnail_url, alt: picture.parameters.prompt, loading: "lazy" });
      shape(image, picture.parameters);
      const face = make("button", { type: "button", className: "card", onclick: () => look(picture) }, make("div", {}, image),
        make("span", { textContent: picture.parameters.prompt }));
      face.dataset.id = picture.id;
      return face;
    }

    function beside(picture, way) {
      return listed[listed.findIndex((other) => other.id === picture.id) + way];
    }

    function look(picture) {
      const act = (name, more = {}) => () => { dialog.close(); trigger(name, { id: picture.id, ...more }); };
      const erase = button("Delete", async () => {
        if (erase.textContent === "Delete") { erase.textContent = "Delete for good?"; return; }
        try {
          await call("DELETE", `/api/v1/pictures/${picture.id}`);
        } catch (error) {
          tell(error.message);
          return;
        }
        dialog.close();
        dispatchEvent(new CustomEvent("litapp-deleted", { detail: picture.id }));
        load();
      }, "danger");
      const save = make("a", { className: "quiet", textContent: "Save", href: picture.url, download: picture.file });
      const negative = picture.parameters.negative_prompt;
      const when = new Date(picture.created * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
      const image = make("img", { src: picture.url, alt: picture.parameters.prompt });
      shape(image, picture.parameters);
      const turn = (text, label, way) => {
        const to = beside(picture, way);
        const face = button(text, () => look(to));
        face.disabled = !to;
        face.setAttribute("aria-label", label);
        return face;
      };
      const close = button("×", () => dialog.close(), "close");
      close.setAttribute("aria-label", "Close");
      dialog.dataset.id = picture.id;
      dialog.replaceChildren(
        image,
        make("div", { className: "side" },
          make("p", { className: "words", textContent: picture.parameters.prompt }),
          negative ? make("p", { className: "facts", textContent: `without ${negative}` }) : null,
          make("p", { className: "facts", textContent: describe(picture.parameters) }),
          make("p", { className: "facts", textContent: when }),
          make("div", { className: "actions" },
            button("Use these settings", act("select"), "main"),
            button("Again with another seed", act("retry")),
            variations(button("Variations", act("retry", { vary: true }))),
            save, button("Open folder", () => trigger("expand", { id: picture.id })), erase),
          make("div", { className: "turn" }, turn("← Newer", "Newer picture", -1), turn("Older →", "Older picture", 1)),
          close));
      // The button that had the focus is gone; the keys go on to the dialog itself.
      if (dialog.open) dialog.focus(); else dialog.showModal();
    }

    dialog.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const to = way && beside({ id: dialog.dataset.id }, way);
      if (to) look(to);
    });

    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    let timer = 0;
    search.oninput = () => { clearTimeout(timer); timer = setTimeout(load, 150); };
    addEventListener("litapp-picture", () => load());
    // Other windows and scripts draw too.
    new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) load(); }).observe(root);
    load();
  }

  // Asks once more: whatever waits or is being drawn goes with the server.
  addEventListener("click", async ({ target }) => {
    if (target.closest?.("#generate") && matchMedia("(max-width: 56rem)").matches) {
      document.querySelector(".stage").scrollIntoView({ behavior: "smooth" });
    }
    const quit = target.closest?.(".quit");
    if (!quit) return;
    if (!quit.classList.contains("sure")) {
      const busyJobs = latest.jobs.filter(busy).length;
      quit.classList.add("sure");
      quit.textContent = busyJobs ? "Stop drawing and quit?" : "Quit litapp?";
      setTimeout(() => { quit.classList.remove("sure"); quit.textContent = "Quit"; }, 4000);
      return;
    }
    quitting = true;
    await call("POST", "/api/v1/quit").catch((error) => { quitting = false; tell(error.message); });
  });

  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      // Gradio reads a text box when it changes, so the last letters are already known.
      document.querySelector(".gradio-container:not(.offline) #generate")?.click();
    }
  }, true);

  return { stage, queue, history };
})();
dispatchEvent(new Event("litapp-ready"));
