"use strict";
// The page of the web app. Names of songs come from strangers: every string becomes text, never HTML.
(() => {
  const POLL = 1000; // ms between two looks at the queue while something is being done
  const REST = 5000; // ms otherwise
  const FORMATS = { wav16: "WAV, 16 bit", wav24: "WAV, 24 bit", float32: "WAV, 32-bit float", flac: "FLAC", mp3: "MP3, 320 kbit/s" };

  const find = (id) => document.getElementById(id);
  const rows = new Map(); // by job
  let server = null;
  let ensembles = [];
  let chosen = []; // files
  let timer = null;

  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }

  // A name of unknown direction; it does not change the order of the text around it.
  const name = (text) => h("bdi", {}, text);

  function setText(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  // ---------------------------------------------------------------------------- requests

  class Refused extends Error {
    constructor(status, detail) {
      super(detail);
      this.status = status;
    }
  }

  async function ask(path, options = {}) {
    let reply;
    try {
      reply = await fetch(path, options);
    } catch {
      throw new Refused(0, "The server does not answer. Is it still running?");
    }
    if (reply.ok) return reply.status === 204 ? null : reply.json();
    const { detail } = await reply.json().catch(() => ({}));
    throw new Refused(reply.status, sentence(detail || `The server answered ${reply.status}.`));
  }

  function upload(file, fields, onProgress) {
    const form = new FormData();
    for (const [key, value] of Object.entries(fields)) form.append(key, value);
    form.append("song", file, file.name);
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest(); // fetch does not report how much has been sent
      request.open("POST", "/api/jobs");
      request.responseType = "json";
      request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
      request.onload = () => {
        if (request.status === 201) resolve(request.response);
        else reject(new Refused(request.status, sentence(request.response?.detail || `The server answered ${request.status}.`)));
      };
      request.onerror = () => reject(new Refused(0, "The upload was interrupted."));
      request.send(form);
    });
  }

  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

  function complain(error) {
    if (error.status === 401) {
      showLogin();
      return;
    }
    setText(find("problem"), error.message);
  }

  // ---------------------------------------------------------------------------- texts

  const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const round = (value) => (value >= 9.95 ? String(Math.round(value)) : String(Number(value.toPrecision(2))));

  function bytes(size) {
    if (size === null) return "unknown";
    return size >= 1e9 ? `${round(size / 1e9)} GB` : `${round(size / 1e6)} MB`;
  }

  function span(seconds) {
    if (seconds < 90) return counted(Math.round(seconds), "second");
    if (seconds < 5400) return counted(Math.round(seconds / 60), "minute");
    return counted(Math.round(seconds / 3600), "hour");
  }

  function clock(seconds) {
    const whole = Math.round(seconds);
    return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
  }

  function time(ensemble) {
    if (ensemble.time !== null) return `${ensemble.is_measured ? "" : "about "}${round(ensemble.time)} × the song's length${ensemble.is_measured ? ", measured here" : ""}`;
    const known = ensembles.filter((one) => one.gflops !== null);
    if (ensemble.gflops === null || known.length < 2) return "not known yet";
    const least = known.reduce((one, other) => (other.gflops < one.gflops ? other : one));
    return ensemble === least ? "the shortest" : `${round(ensemble.gflops / least.gflops)} × the work of ${least.name}`;
  }

  function state(job) {
    if (job.state === "queued") return job.position === 1 ? "Next in the queue" : `Number ${job.position} in the queue`;
    if (job.state === "running") return job.progress === null ? `${sentence(job.doing).slice(0, -1)} …` : `${sentence(job.doing).slice(0, -1)}, ${Math.floor(100 * job.progress)} %`;
    if (job.state === "done") return `Done. Deleted in ${span(Math.max(0, (Date.parse(job.expires) - Date.now()) / 1000))}.`;
    return job.state === "failed" ? "Failed." : "Canceled.";
  }

  // ---------------------------------------------------------------------------- what to submit

  // The ensembles, first those that need no download.
  async function offered() {
    const all = await ask("/api/ensembles");
    return [...all.filter((one) => one.is_here), ...all.filter((one) => !one.is_here)];
  }

  function showEnsembles() {
    const known = document.querySelector("input[name=ensemble]:checked")?.value;
    const first = known ?? (ensembles.find((one) => one.is_here) ?? ensembles[0])?.name;
    const fact = (title, text) => [h("dt", {}, title), h("dd", {}, text)];
    find("ensembles").replaceChildren(
      ...ensembles.map((one) =>
        h(
          "label",
          { class: "ensemble" },
          h("input", { type: "radio", name: "ensemble", value: one.name, checked: one.name === first }),
          h(
            "div",
            {},
            h("div", {}, h("strong", {}, one.name)),
            h("div", { class: "title" }, one.title),
            h(
              "dl",
              {},
              fact("Score", one.score ?? "not measured"),
              fact("Time", time(one)),
              fact("License", one.license),
              one.is_here ? null : fact("Download", `${bytes(one.download)}, once`),
            ),
          ),
        ),
      ),
    );
    find("footnote").hidden = !ensembles.some((one) => one.score?.endsWith("*"));
    showStems();
  }

  const ensemble = () => ensembles.find((one) => one.name === document.querySelector("input[name=ensemble]:checked")?.value);

  function showStems() {
    const names = ensemble()?.stems ?? [];
    const boxes = [...document.querySelectorAll("input[name=stem]")];
    const off = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    const same = boxes.map((box) => box.value).join() === names.join();
    if (same) return;
    find("stems").replaceChildren(
      ...names.map((stem) => {
        const isSum = stem === "instrumental" && names.length > 2;
        const isOn = boxes.some((box) => box.value === stem) ? !off.has(stem) : !isSum;
        return h("label", {}, h("input", { type: "checkbox", name: "stem", value: stem, checked: isOn }), isSum ? "instrumental (all but vocals)" : stem);
      }),
    );
  }

  function choose(files) {
    chosen = [...files];
    const [first] = chosen;
    const text = find("chosen");
    if (chosen.length === 0) text.replaceChildren();
    else if (chosen.length === 1) text.replaceChildren(name(first.name));
    else text.replaceChildren(name(first.name), ` and ${counted(chosen.length - 1, "other file")}`);
  }

  async function submit(event) {
    event.preventDefault();
    setText(find("problem"), "");
    const stems = [...document.querySelectorAll("input[name=stem]:checked")].map((box) => box.value);
    if (chosen.length === 0) {
      complain(new Error("Choose a song first."));
      find("songs").focus();
      return;
    }
    if (stems.length === 0) {
      complain(new Error("Choose at least one stem."));
      document.querySelector("input[name=stem]")?.focus();
      return;
    }
    const fields = { ensemble: ensemble().name, stems: stems.join(","), format: find("format").value };
    const files = chosen;
    const problems = [];
    choose([]);
    find("songs").value = "";
    find("go").disabled = true;
    for (const [at, file] of files.entries()) {
      const before = files.length > 1 ? `Uploading ${at + 1} of ${files.length}` : "Uploading";
      const progress = (share) => setText(find("news"), share < 1 ? `${before}, ${Math.floor(100 * share)} %` : `${before}: checking the song …`);
      progress(0);
      try {
        if (file.size > server.max_size) throw new Refused(413, `The file is larger than ${bytes(server.max_size)}, the most that this server takes.`);
        await upload(file, fields, progress);
        await look();
      } catch (error) {
        if (error.status === 401) complain(error);
        problems.push(`${file.name}: ${error.message}`);
        setText(find("problem"), problems.join("\n"));
      }
    }
    find("go").disabled = false;
    const count = files.length - problems.length;
    setText(find("news"), count ? `${counted(count, "song")} added to the queue.` : "");
  }

  // ---------------------------------------------------------------------------- the queue

  function row(job) {
    const parts = {
      title: h("h3", {}, name(job.title)),
      facts: h("p", { class: "note" }, `${clock(job.seconds)} · ${job.ensemble} · ${job.stems.join(", ")} · ${FORMATS[job.format] ?? job.format}`),
      state: h("p", { class: "state" }),
      bar: h("progress", { max: 1, "aria-label": `Progress of ${job.title}` }),
      error: h("p", { class: "error" }),
      warnings: h("div"),
      actions: h("div", { class: "actions" }),
      shown: "",
    };
    parts.element = h("li", { class: "job" }, parts.title, parts.facts, parts.state, parts.bar, parts.error, parts.warnings, parts.actions);
    return parts;
  }

  function action(text, label, act) {
    const button = h("button", { type: "button", "aria-label": label }, text);
    button.addEventListener("click", async () => {
      button.disabled = true;
      setText(find("problem"), "");
      try {
        await act();
      } catch (error) {
        complain(error);
      }
      button.disabled = false;
      await look();
    });
    return button;
  }

  function actions(job) {
    const base = `/api/jobs/${job.id}`;
    if (job.state === "queued" || job.state === "running") {
      return [action("Cancel", `Cancel ${job.title}`, () => ask(`${base}/cancel`, { method: "POST" }))];
    }
    const link = (text, label, address, extra) => h("a", { class: "button", href: address, "aria-label": label, ...extra }, text);
    const stems = Object.entries(job.files);
    const remove = action("Delete", `Delete ${job.title}`, () => ask(base, { method: "DELETE" }));
    remove.classList.add("last");
    return [
      job.page ? link("Listen", `Listen to ${job.title}`, job.page, { target: "_blank", rel: "noopener", class: "button main" }) : null,
      stems.length ? h("span", { class: "note", "aria-hidden": "true" }, "Download") : null,
      ...stems.map(([stem, address]) => link(stem, `Download ${stem} of ${job.title}`, address, { download: "" })),
      stems.length > 1 ? link("All (zip)", `Download all stems of ${job.title}`, job.zip, { download: "" }) : null,
      remove,
    ].filter((one) => one !== null);
  }

  function update(parts, job) {
    setText(parts.state, state(job));
    setText(parts.error, job.error ? sentence(job.error) : "");
    parts.bar.hidden = job.state !== "running";
    if (job.progress === null) parts.bar.removeAttribute("value");
    else parts.bar.value = job.progress;
    const shown = `${job.state} ${job.page} ${job.warnings.length}`;
    if (parts.shown === shown) return; // keeps the focus
    const hadFocus = parts.actions.contains(document.activeElement);
    parts.shown = shown;
    parts.actions.replaceChildren(...actions(job));
    parts.warnings.replaceChildren(...job.warnings.map((text) => h("p", { class: "warning" }, sentence(text))));
    if (hadFocus) parts.actions.querySelector("a, button")?.focus();
  }

  function show(jobs) {
    const list = find("jobs");
    const known = new Set(jobs.map((job) => job.id));
    for (const [id, parts] of rows) {
      if (known.has(id)) continue;
      parts.element.remove();
      rows.delete(id);
    }
    for (const job of jobs) {
      if (!rows.has(job.id)) {
        rows.set(job.id, row(job));
        list.prepend(rows.get(job.id).element); // the newest first
      }
      update(rows.get(job.id), job);
    }
    find("empty").hidden = jobs.length > 0;
  }

  let finished = null; // how many jobs were over at the last look

  async function look() {
    clearTimeout(timer);
    let isBusy = false;
    try {
      const jobs = await ask("/api/jobs");
      show(jobs);
      isBusy = jobs.some((job) => job.state === "queued" || job.state === "running");
      const over = jobs.filter((job) => job.state === "done").length;
      if (finished !== null && over !== finished) {
        ensembles = await offered(); // their times may have been measured
        showEnsembles();
      }
      finished = over;
      if (find("problem").dataset.lost) {
        delete find("problem").dataset.lost;
        setText(find("problem"), "");
      }
    } catch (error) {
      if (error.status === 0) find("problem").dataset.lost = "yes";
      complain(error);
      if (error.status === 401) return;
    }
    clearTimeout(timer);
    timer = setTimeout(look, isBusy && !document.hidden ? POLL : REST);
  }

  // ---------------------------------------------------------------------------- beginning

  function showLogin() {
    clearTimeout(timer);
    find("login").hidden = false;
    find("submit").hidden = find("queue").hidden = true;
    find("token").focus();
  }

  async function login(token) {
    await ask("/api/login", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ token }) });
  }

  async function begin() {
    try {
      server = await ask("/api/server");
      ensembles = await offered();
    } catch (error) {
      complain(error);
      return;
    }
    setText(find("problem"), "");
    find("login").hidden = true;
    find("submit").hidden = find("queue").hidden = false;
    setText(find("limits"), `Songs of at most ${span(server.max_length)} and ${bytes(server.max_size)}. Results are deleted after ${span(server.keep)}.`);
    setText(find("version"), `kmdx-net ${server.version}`);
    find("format").replaceChildren(...server.formats.map((format) => h("option", { value: format }, FORMATS[format] ?? format)));
    showEnsembles();
    await look();
  }

  find("login").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await login(find("token").value.trim());
    } catch (error) {
      setText(find("problem"), error.message);
      return;
    }
    find("token").value = "";
    await begin();
  });
  find("submit").addEventListener("submit", submit);
  find("songs").addEventListener("change", (event) => choose(event.target.files));
  find("ensembles").addEventListener("change", showStems);
  document.addEventListener("visibilitychange", () => !document.hidden && timer !== null && look());

  const drop = find("drop");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) choose(event.dataTransfer.files);
  });

  (async () => {
    const token = new URLSearchParams(location.hash.slice(1)).get("token");
    if (token !== null) {
      history.replaceState(null, "", location.pathname); // it does not stay in the address bar
      await login(token).catch((error) => setText(find("problem"), error.message));
    }
    await begin();
  })();
})();
