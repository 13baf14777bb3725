(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { stems, columns, songs, metrics } = data;

  const decibels = (value, digits = 2) => number(value, digits);
  const clock = (seconds) => {
    const whole = Math.floor(seconds + 1e-6);
    return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
  };
  const present = (values) => values.filter((value) => value != null);

  // ---------------------------------------------------------------- the distribution over songs

  const tip = h("div", { id: "tip", hidden: true });

  const measure = () => find("measure").value;
  const metricOf = (name) => metrics.find((metric) => metric.name === name);
  const labelOf = (metric) => (metric.unit ? `${metric.title}, ${metric.unit}` : metric.title);
  const withUnit = (value, metric) => `${decibels(value)}${metric.unit ? ` ${metric.unit}` : ""}`;

  function drawSpread() {
    const figure = find("spread");
    if (!figure) return;
    const style = getComputedStyle(figure);
    const width = figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    if (width < 150 || figure.dataset.drawn === `${measure()} ${Math.round(width)}`) return;
    figure.dataset.drawn = `${measure()} ${Math.round(width)}`;
    const metric = metricOf(measure());
    find("spread-of").textContent = metric.title;

    const narrow = width < 560;
    const left = narrow ? 4 : 150;
    const right = width - 10;
    const radius = narrow ? 3.5 : 4.5;
    const row = narrow ? 88 : 78;
    const all = columns.flatMap((column) => present(songs.map((song) => song.scores[metric.name][column])));
    if (!all.length) {
      figure.replaceChildren(h("p", { class: "empty" }, "No song has a value."), tip);
      return;
    }
    // The axis spans the bulk: a silent reference's -30 dB would press all others together.
    const sortedAll = all.slice().sort((a, b) => a - b);
    const middleHalf = Math.max(quantile(sortedAll, 0.75) - quantile(sortedAll, 0.25), 1);
    let low = sortedAll.find((value) => value >= quantile(sortedAll, 0.25) - 4 * middleHalf);
    let high = sortedAll.findLast((value) => value <= quantile(sortedAll, 0.75) + 4 * middleHalf);
    const size = tickStep(Math.max(high - low, 2), narrow ? 5 : 10);
    low = Math.floor((low - size * 0.1) / size) * size;
    high = Math.ceil((high + size * 0.1) / size) * size;
    const x = (value) => left + ((within(value, low, high) - low) / (high - low)) * (right - left);
    const beyond = all.filter((value) => value < low || value > high).length;
    const height = row * columns.length + 40;

    const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${labelOf(metric)} of every song by stem` });
    for (let tick = low; tick <= high + size / 1e3; tick += size) {
      const text = decibels(tick, size < 1 ? 1 : 0);
      drawing.append(
        s("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 4, y2: height - 36 }),
        s("text", { x: x(tick), y: height - 18, "text-anchor": "middle" }, text),
      );
    }
    drawing.append(s("text", { x: right, y: height - 1, "text-anchor": "end" }, labelOf(metric)));

    columns.forEach((column, number) => {
      const dots = songs
        .map((song, index) => ({ index, value: song.scores[metric.name][column] }))
        .filter((dot) => dot.value != null)
        .sort((one, two) => one.value - two.value);
      const top = row * number;
      const middle = top + (narrow ? 56 : row / 2);
      const half = narrow ? 24 : 31;
      const sorted = dots.map((dot) => dot.value);
      const group = s("g", { class: column, role: "group", "aria-label": column === "song" ? "mean of the stems" : column });
      if (sorted.length) {
        const median = quantile(sorted, 0.5);
        const name = s("text", { class: "stem", x: 0, y: narrow ? top + 22 : middle - 2 }, column === "song" ? "mean of stems" : column);
        const note = `median ${decibels(median)}`;
        group.append(name, s("text", { class: "middle", x: narrow ? right : 0, y: narrow ? top + 22 : middle + 16, "text-anchor": narrow ? "end" : "start" }, note));
        if (sorted.length >= 5) {
          const from = x(quantile(sorted, 0.25));
          const to = x(quantile(sorted, 0.75));
          group.append(s("rect", { class: "box", x: from, y: middle - half, width: to - from, height: 2 * half, rx: 5 }));
        }
        group.append(s("line", { class: "median", x1: x(median), x2: x(median), y1: middle - half, y2: middle + half }));
      }
      // Place each dot as close to the middle as the previous dots allow.
      const placed = [];
      const gap = 2 * radius + 0.5;
      dots.forEach((dot, place) => {
        const off = dot.value < low || dot.value > high;
        const across = x(dot.value);
        const near = placed.filter((other) => across - other.across < gap);
        let down = 0;
        for (let layer = 0; layer < 40; layer++) {
          const tried = Math.ceil(layer / 2) * (layer % 2 ? 1 : -1) * (gap / 2);
          down = within(tried, -half + radius, half - radius);
          if (near.every((other) => (other.across - across) ** 2 + (other.down - down) ** 2 >= gap * gap - 0.1)) break;
        }
        placed.push({ across, down });
        const song = songs[dot.index];
        group.append(
          s("circle", {
            class: off ? "off" : null, cx: across.toFixed(1), cy: (middle + down).toFixed(1), r: radius, role: "link",
            tabindex: place === Math.floor(dots.length / 2) ? 0 : -1, "data-index": dot.index,
            "aria-label": `${song.name}: ${column === "song" ? "mean" : column} ${withUnit(dot.value, metric)}`,
          }),
        );
      });
      drawing.append(group);
    });
    const caption = beyond ? [h("figcaption", {}, `${beyond} ${beyond === 1 ? "value is" : "values are"} outside the axis (hollow dots at its ends).`)] : [];
    figure.replaceChildren(drawing, ...caption, tip);
  }

  function showTip(dot) {
    const figure = find("spread");
    figure.querySelectorAll(".same").forEach((other) => other.classList.remove("same"));
    tip.hidden = !dot;
    if (!dot) return;
    figure.querySelectorAll(`circle[data-index="${dot.dataset.index}"]`).forEach((other) => other.classList.add("same"));
    const song = songs[dot.dataset.index];
    const column = dot.parentNode.classList[0];
    tip.replaceChildren(song.name, h("br"), column === "song" ? "mean " : `${column} `, h("b", {}, withUnit(song.scores[measure()][column], metricOf(measure()))));
    const frame = figure.getBoundingClientRect();
    const box = dot.getBoundingClientRect();
    const half = tip.offsetWidth / 2;
    tip.style.left = `${within(box.x + box.width / 2 - frame.x, half + 4, frame.width - half - 4)}px`;
    tip.style.top = `${box.y - frame.y}px`;
  }

  const spread = find("spread");
  if (spread) {
    const dotOf = (event) => event.target.closest("circle");
    spread.addEventListener("pointerover", (event) => showTip(dotOf(event)));
    spread.addEventListener("pointerleave", () => showTip(null));
    spread.addEventListener("focusin", (event) => showTip(dotOf(event)));
    spread.addEventListener("focusout", () => showTip(null));
    spread.addEventListener("click", (event) => dotOf(event) && show(Number(dotOf(event).dataset.index)));
    // Tab reaches one dot of each row; arrow keys reach the others.
    spread.addEventListener("keydown", (event) => {
      const dot = dotOf(event);
      if (!dot) return;
      const dots = [...dot.parentNode.querySelectorAll("circle")];
      const to = { ArrowRight: 1, ArrowLeft: -1, Home: -dots.length, End: dots.length }[event.key];
      if (to) {
        const next = dots[within(dots.indexOf(dot) + to, 0, dots.length - 1)];
        dot.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        event.preventDefault();
      } else if (event.key === "Enter" || event.key === " ") {
        show(Number(dot.dataset.index));
        event.preventDefault();
      }
    });
    new ResizeObserver(drawSpread).observe(spread);
    drawSpread();
  }

  // ---------------------------------------------------------------- the table

  const table = find("table");
  const body = table.tBodies[0];
  const rows = [...body.querySelectorAll("tr[data-index]")];
  const songOf = (row) => songs[row.dataset.index];

  function valueOf(song, key) {
    return columns.includes(key) ? song.scores[measure()][key] ?? null : song[key] ?? null;
  }

  function sort(key, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const byName = new Intl.Collator(undefined, { numeric: true });
    const order = rows.slice().sort((one, two) => {
      const a = valueOf(songOf(one), key);
      const b = valueOf(songOf(two), key);
      if (a === null || b === null) return (a === null) - (b === null) || one.dataset.index - two.dataset.index;
      const difference = key === "name" ? byName.compare(a, b) : a - b;
      return sign * difference || one.dataset.index - two.dataset.index;
    });
    body.append(...order);
    for (const head of table.tHead.rows[0].cells) {
      head.setAttribute("aria-sort", head.dataset.key === key ? direction : "none");
    }
    if (panel.open) place();
  }

  function fill() {
    for (const column of columns) {
      const values = songs.map((song) => valueOf(song, column));
      const sorted = present(values).sort((a, b) => a - b);
      for (const row of rows) {
        const cell = row.querySelector(`td[data-column="${column}"]`);
        const value = valueOf(songOf(row), column);
        cell.textContent = decibels(value);
        const depth = value === null || sorted.length < 3 ? 0 : (24 * sorted.findIndex((other) => other >= value)) / (sorted.length - 1);
        cell.style.setProperty("--depth", depth.toFixed(1));
      }
    }
  }

  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th[data-key]");
    if (!head) return;
    const rising = columns.includes(head.dataset.key) && !metricOf(measure()).higher;
    const first = head.dataset.key === "name" || rising ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    sort(head.dataset.key, head.getAttribute("aria-sort") === first ? second : first);
  });
  find("measure").addEventListener("change", () => {
    fill();
    drawSpread();
    const head = table.querySelector('th[data-key]:not([aria-sort="none"])');
    if (head && columns.includes(head.dataset.key)) sort(head.dataset.key, head.getAttribute("aria-sort"));
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-index]");
    if (!row || event.ctrlKey || event.metaKey || event.shiftKey || String(getSelection())) return;
    event.preventDefault();
    show(Number(row.dataset.index));
  });

  // ---------------------------------------------------------------- one song

  const panel = find("panel");
  const content = find("content");
  let shown = null;
  let player = null; // of the song, if its stems were kept

  const hashOf = (song) => `#song=${encodeURIComponent(song.name)}`;
  const sequence = () => [...body.querySelectorAll("tr[data-index]")].map((row) => Number(row.dataset.index));

  function show(index) {
    // Opening a song adds an entry to the browser history; moving to the next song does not.
    const target = hashOf(songs[index]);
    if (location.hash !== target) {
      if (panel.open) history.replaceState(null, "", target);
      else history.pushState(null, "", target);
    }
    open(index);
  }

  function open(index) {
    if (!panel.open) panel.showModal(); // before drawing, which needs the width
    if (shown !== index) {
      shown = index;
      draw(songs[index]);
    }
    place();
    panel.scrollTop = 0;
    find("panel-title").focus({ preventScroll: true });
  }

  function route() {
    let name = null;
    if (location.hash.startsWith("#song=")) {
      try {
        name = decodeURIComponent(location.hash.slice(6));
      } catch {
        name = null; // not an address of this page
      }
    }
    const index = songs.findIndex((song) => song.name === name);
    if (index >= 0) open(index);
    else if (panel.open) panel.close();
  }

  function place() {
    const order = sequence();
    const at = order.indexOf(shown);
    find("place").textContent = `${at + 1} of ${order.length}`;
    find("previous").disabled = at <= 0;
    find("next").disabled = at >= order.length - 1;
    for (const row of rows) row.setAttribute("aria-current", String(Number(row.dataset.index) === shown));
  }

  function go(by) {
    const order = sequence();
    const next = order[order.indexOf(shown) + by];
    if (next !== undefined) show(next);
  }

  find("previous").addEventListener("click", () => go(-1));
  find("next").addEventListener("click", () => go(1));
  find("close").addEventListener("click", () => panel.close());
  panel.addEventListener("click", (event) => event.target === panel && panel.close());
  panel.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "n" || event.key === "N") go(1);
    if (event.key === "p" || event.key === "P") go(-1);
  });
  panel.addEventListener("close", () => {
    const row = rows.find((other) => Number(other.dataset.index) === shown);
    clear();
    shown = null;
    if (location.hash.startsWith("#song=")) history.replaceState(null, "", location.pathname + location.search);
    row?.querySelector("a").focus({ preventScroll: true });
  });
  addEventListener("popstate", route); // also when the address is edited

  const fact = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, ...value));

  function clear() {
    player?.destroy();
    player = null;
    content.replaceChildren();
  }

  function draw(song) {
    clear();
    find("panel-title").textContent = song.name;
    content.style.setProperty("--cursor", -1);
    delete content.dataset.cursor;
    const scored = Object.keys(song.envelopes).length > 0 || Object.keys(song.frames).length > 0;
    const late = song.factor !== null && song.factor > data.timeLimit;
    const facts = h(
      "dl",
      { class: "facts" },
      ...metrics.slice(0, 2).map((metric) => {
        const value = song.scores[metric.name].song;
        return value == null ? null : fact(stems.length > 1 ? `${metric.title}, mean of stems` : metric.title, h("b", {}, withUnit(value, metric)));
      }),
      song.duration == null ? null : fact("Length", clock(Math.round(song.duration))),
      song.seconds === null ? null : fact("Took", `${song.seconds.toFixed(1)} s`),
      song.factor === null ? null : fact("Real-time factor", h("span", { class: late ? "bad" : null }, song.factor.toFixed(song.factor < 0.1 ? 3 : 2)), h("small", {}, ` of ${data.timeLimit} allowed`)),
      song.memory === null ? null : fact("Peak host memory", `${song.memoryText} `, h("small", {}, `of ${data.memoryLimit} allowed`)),
      song.gpuText === null ? null : fact("Peak GPU memory", song.gpuText),
    );
    const said = [
      song.reason ? h("p", { class: "said bad" }, scored ? song.reason : `Failed: ${song.reason}`) : null,
      song.flags.filter((flag) => flag !== "failed").length
        ? h("p", { class: "flags", style: "margin-bottom:1rem" }, song.flags.filter((flag) => flag !== "failed").map((flag) => h("span", { class: flag.startsWith("silent") ? "flag" : "flag bad" }, flag)))
        : null,
      ...song.warnings.map((warning) => h("p", { class: "said" }, warning)),
    ];
    const parts = [facts, ...said];
    if (scored) {
      const span = Math.max(song.duration ?? 0, 1);
      const tracks = tracksOf(song);
      const place = tracks.length ? h("div", { class: "player" }) : slider(song, span);
      parts.push(place, ...stems.map((stem) => stemCard(song, stem, span)));
      content.replaceChildren(...parts.filter((part) => part !== null));
      const sides = { a: "Estimates", b: "References" };
      const onMove = (time) => moveTo(time / span, span, song, false);
      if (tracks.length) player = kmdxPlayer(place, { duration: span, sides, tracks }, { keys: panel, onMove });
      return;
    }
    content.replaceChildren(...parts.filter((part) => part !== null));
  }

  const framesOf = (song, stem) => (song.frames[data.framed] ?? {})[stem];

  // The sounds of a song for the player; none if its stems were not kept.
  function tracksOf(song) {
    return ["estimate", "reference"].flatMap((which) =>
      stems
        .filter((stem) => song.media[stem]?.[which] && song.envelopes[stem])
        .map((stem) => ({
          name: `${stem}, ${which}`, key: stem, side: which === "estimate" ? "a" : "b", media: song.media[stem][which],
          peaks: song.envelopes[stem][which].map((value) => value / 100),
        })),
    );
  }

  // One position for every plot of a song without a player.
  function slider(song, span) {
    const input = h("input", { type: "range", min: 0, max: span.toFixed(2), step: span > 20 ? 1 : 0.1, value: 0, id: "position" });
    input.addEventListener("input", () => moveTo(Number(input.value) / span, span, song, true));
    return h("div", { class: "position" }, h("label", { for: "position" }, "Position"), input, h("output", { for: "position" }, `${clock(0)} of ${clock(span)}`));
  }

  function moveTo(part, span, song, seek) {
    const time = within(part, 0, 1) * span;
    content.style.setProperty("--cursor", within(part, 0, 1));
    content.dataset.cursor = "";
    const input = content.querySelector("#position");
    if (input) {
      input.value = time;
      input.setAttribute("aria-valuetext", `${clock(time)} of ${clock(span)}`);
      content.querySelector("output").textContent = `${clock(time)} of ${clock(span)}`;
    }
    for (const card of content.querySelectorAll(".stem[data-stem]")) {
      const frames = framesOf(song, card.dataset.stem) ?? [];
      const frame = frames[Math.min(Math.floor(time), frames.length - 1)];
      const now = card.querySelector(".now");
      now.replaceChildren(`at ${clock(time)} `, h("b", {}, frame == null ? "–" : `${decibels(frame)} dB`));
    }
    if (seek && player) player.transport.currentTime = time;
  }

  function plot(kind, span, song, ...children) {
    const element = h("div", { class: `plot ${kind}` }, ...children);
    const partAt = (event) => {
      const box = element.getBoundingClientRect();
      return (event.clientX - box.x) / box.width;
    };
    const playing = () => player && !player.transport.paused;
    element.addEventListener("pointermove", (event) => event.pointerType === "mouse" && !playing() && moveTo(partAt(event), span, song, false));
    element.addEventListener("click", (event) => moveTo(partAt(event), span, song, true));
    return element;
  }

  const track = (ticks, element, label = null) =>
    h("div", { class: "track" }, label && h("p", { class: "above" }, label), h("div", { class: "ticks", "aria-hidden": "true" }, ticks.map(([part, text]) => h("span", { style: `top:${(100 * part).toFixed(2)}%` }, text))), element);

  function stemCard(song, stem, span) {
    const media = song.media[stem] ?? {};
    const silent = song.silent.includes(stem);
    const head = h(
      "div",
      { class: "head" },
      h("h3", { class: `name ${stem}` }, stem),
      ...metrics.map((metric) => h("p", {}, `${metric.title} `, h("b", {}, withUnit(song.scores[metric.name][stem], metric)))),
      silent ? h("span", { class: "flag" }, "silent reference") : null,
      h("p", { class: "now" }),
    );
    const parts = [head];
    const envelopes = song.envelopes[stem];
    if (envelopes && !(media.estimate && media.reference)) {
      const peak = Math.max(...envelopes.reference, ...envelopes.estimate, 1);
      for (const which of ["reference", "estimate"]) {
        const highest = Math.max(...envelopes[which]);
        const label = highest ? `${which}, peak ${highest} % of full scale` : `${which}, silent`;
        parts.push(track([], waveform(song, which, envelopes[which], peak, span), label));
      }
    }
    if (framesOf(song, stem)) parts.push(framesTrack(song, stem, span));
    if (media.picture) parts.push(pictureTrack(song, stem, media.picture, span));
    parts.push(timeAxis(span));
    if (media.picture) parts.push(h("p", { class: "scale" }, `−${data.range} dB`, h("i"), "0 dB, relative to the loudest point of the reference"));
    return h("article", { class: `card stem ${stem}`, "data-stem": stem }, ...parts);
  }

  function waveform(song, which, values, peak, span) {
    const count = values.length;
    const upper = values.map((value, at) => `${at + 0.5},${(100 - (98 * value) / peak - 0.6).toFixed(1)}`);
    const lower = values.map((value, at) => `${at + 0.5},${(100 + (98 * value) / peak + 0.6).toFixed(1)}`).reverse();
    const highest = Math.max(...values);
    const drawing = s(
      "svg",
      { viewBox: `0 0 ${count} 200`, preserveAspectRatio: "none", role: "img", "aria-label": `Waveform of the ${which}, peak ${highest} % of full scale` },
      s("path", { d: `M0,100 L${upper.join(" ")} L${count},100 L${lower.join(" ")} Z` }),
    );
    return plot(`wave ${which}`, span, song, drawing);
  }

  function framesTrack(song, stem, span) {
    const all = present(stems.flatMap((other) => framesOf(song, other) ?? []));
    const low = within(Math.floor(Math.min(...all, 0) / 10) * 10, -30, 0);
    const high = within(Math.ceil(Math.max(...all, 10) / 10) * 10, 10, 50);
    const frames = framesOf(song, stem);
    const y = (value) => 100 * (1 - (within(value, low, high) - low) / (high - low));
    let line = "";
    let points = "";
    frames.forEach((value, at) => {
      if (value == null) return;
      const place = `${(at + 0.5).toFixed(1)},${y(value).toFixed(1)}`;
      const after = frames[at - 1] != null;
      line += `${after ? "L" : "M"}${place}`;
      if (!after && frames[at + 1] == null) points += `M${place}h0.001`;
    });
    const ticks = [];
    const apart = high - low > 40 ? 20 : 10;
    for (let tick = Math.ceil(low / apart) * apart; tick <= high; tick += apart) ticks.push(tick);
    const metric = metricOf(data.framed);
    const median = song.scores[metric.name][stem];
    const drawing = s(
      "svg",
      { viewBox: `0 0 ${span} 100`, preserveAspectRatio: "none", role: "img", "aria-label": `${metric.title} of each second, ${stem}, median ${withUnit(median, metric)}` },
      ...ticks.map((tick) => s("line", { x1: 0, x2: span, y1: y(tick), y2: y(tick) })),
      median == null ? null : s("line", { class: "median", x1: 0, x2: span, y1: y(median), y2: y(median) }),
      s("path", { d: line }),
      points ? s("path", { class: "points", d: points }) : null,
    );
    const labels = ticks.map((tick) => [y(tick) / 100, decibels(tick, 0)]);
    const text = line ? `${labelOf(metric)} by second (dashed: median)` : `${metric.title}: no second has a value`;
    return track(labels, plot("frames", span, song, drawing), text);
  }

  function pictureTrack(song, stem, address, span) {
    const [half, gap] = data.rows;
    const whole = 2 * half + gap;
    const ticks = [0, half + gap].flatMap((top) => data.frequencies.map(([text, part]) => [(top + part * half) / whole, text]));
    const image = h("img", { src: address, loading: "lazy", alt: `Spectrograms of ${stem}, the reference above the estimate, 40 Hz to 16 kHz` });
    const labels = [h("span", { class: "label" }, "reference"), h("span", { class: "label", style: `top:calc(${(100 * (half + gap)) / whole}% + .25rem)` }, "estimate")];
    return track(ticks, plot("picture", span, song, image, ...labels), "spectrograms");
  }

  function timeAxis(span) {
    const size = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600].find((length) => span / length <= (innerWidth < 640 ? 5 : 9)) ?? 1200;
    const marks = [];
    for (let time = 0; time <= span; time += size) {
      const text = size < 1 ? time.toFixed(1) : clock(time);
      marks.push(h("span", { style: `left:${(100 * time) / span}%`, class: time / span > 0.97 ? "last" : null }, text));
    }
    return h("div", { class: "track", "aria-hidden": "true" }, h("div"), h("div", { class: "clock" }, marks));
  }

  fill();
  route();
})();
