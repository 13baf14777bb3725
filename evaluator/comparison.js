(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { songs, systems, metrics, columns } = data;

  const score = (value) => number(value, 3);
  const signed = (value, digits = 3) => (value == null ? "–" : (rounded(value, digits) >= 0 ? "+" : "") + number(value, digits));
  const metric = () => metrics.find((each) => each.name === find("metric").value);
  const stem = () => find("stem").value;
  const stemTitle = () => (stem() === data.song ? "mean of stems" : stem());
  const differences = () => data.differences.filter((each) => each.metric === metric().name && each.stem === stem());
  const withUnit = (text) => (metric().unit ? `${text} ${metric().unit}` : text);

  // ---------------------------------------------------------------- scores

  const table = find("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const valueOf = (row, key) =>
    key === "name" ? systems[row.dataset.index].name : data.values[metric().name][find("statistic").value][row.dataset.index][key];

  function fill() {
    for (const column of columns) {
      const sorted = rows.map((row) => valueOf(row, column)).filter((value) => value != null).sort((a, b) => a - b);
      if (!metric().higher) sorted.reverse();
      for (const row of rows) {
        const value = valueOf(row, column);
        const cell = row.querySelector(`td[data-column="${CSS.escape(column)}"]`);
        cell.textContent = score(value);
        const depth = value == null || sorted.length < 2 ? 0 : (24 * sorted.indexOf(value)) / (sorted.length - 1);
        cell.style.setProperty("--depth", depth.toFixed(1));
      }
    }
    for (const row of rows) row.hidden = columns.every((column) => valueOf(row, column) == null);
    const way = find("statistic").value;
    find("over").textContent = `${metric().label}, ${metric().titles[way]}${metric().higher ? "" : "; lower is better"}`;
  }

  function sort(key, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((one, two) => {
      const [a, b] = [valueOf(one, key), valueOf(two, key)];
      if (a == null || b == null) return (a == null) - (b == null);
      return sign * (key === "name" ? a.localeCompare(b) : a - b);
    });
    body.append(...rows);
    for (const head of table.tHead.rows[0].cells) head.setAttribute("aria-sort", head.dataset.key === key ? direction : "none");
  }

  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th[data-key]");
    if (!head) return;
    const first = head.dataset.key === "name" || !metric().higher ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    sort(head.dataset.key, head.getAttribute("aria-sort") === first ? second : first);
  });

  function again() {
    const head = table.tHead.querySelector('th:not([aria-sort="none"])');
    if (head) sort(head.dataset.key, head.getAttribute("aria-sort"));
  }

  // ---------------------------------------------------------------- pairs

  function chosen() {
    const value = find("pair")?.value;
    return differences().find((each) => !value || `${each.a} ${each.b}` === value);
  }

  function fillPairs() {
    const now = chosen();
    find("pairs").replaceChildren(
      ...differences().map((each) => {
        const cell = (label, text) => h("td", { class: "number", "data-label": label }, text);
        const interval = each.low == null ? "–" : `${signed(each.low)} … ${signed(each.high)}`;
        const classes = [each.better ? "decided" : "", each === now && data.differences.length > 1 ? "chosen" : ""].join(" ").trim();
        return h(
          "tr",
          { class: classes || null },
          h("th", { scope: "row" }, `${systems[each.b].name} against ${systems[each.a].name}`),
          cell("difference", withUnit(signed(each.difference))),
          cell("interval", interval),
          cell("p", each.p),
          cell("songs", `${each.wins} better, ${each.losses} worse`),
          h("td", {}, each.verdict),
        );
      }),
    );
  }

  // ---------------------------------------------------------------- songs

  function scoreOf(system, song) {
    const scores = systems[system].scores[metric().name];
    const values = (stem() === data.song ? data.meanStems : [stem()]).map((each) => scores?.[each]?.[song]);
    return values.some((value) => value == null) ? null : values.reduce((sum, value) => sum + value, 0) / values.length;
  }

  const tip = h("div", { id: "tip", hidden: "" });
  let shown = [];

  function pairedSongs(pair) {
    const found = songs.map((name, song) => ({ name, a: scoreOf(pair.a, song), b: scoreOf(pair.b, song) }));
    const both = found.filter((each) => each.a != null && each.b != null);
    for (const each of both) each.step = each.b - each.a;
    return both.sort((one, two) => one.step - two.step);
  }

  function axis(steps, pair) {
    // The axis covers most songs: a single song at -12 dB would squeeze all others.
    const spread = Math.max(quantile(steps, 0.75) - quantile(steps, 0.25), 0.02);
    let low = Math.min(0, pair.low ?? 0, steps.find((step) => step >= quantile(steps, 0.25) - 4 * spread));
    let high = Math.max(0, pair.high ?? 0, steps.findLast((step) => step <= quantile(steps, 0.75) + 4 * spread));
    const size = tickStep(Math.max(high - low, 0.02), 6);
    low = Math.floor(low / size - 0.1) * size;
    high = Math.ceil(high / size + 0.1) * size;
    return { low, high, size, digits: Math.max(0, -Math.floor(Math.log10(size) + 1e-9)) };
  }

  function draw() {
    const figure = find("spread");
    const pair = chosen();
    shown = pair ? pairedSongs(pair) : [];
    const names = pair ? [systems[pair.a].name, systems[pair.b].name] : [];
    find("plot-lead").textContent = pair
      ? `${metric().title} of ${names[1]} minus that of ${names[0]}, ${stemTitle()}: one dot per song, sorted. The band is the 95% interval of the ${metric().statistic} difference.`
      : "";
    fillSongs(names);
    if (!shown.length) {
      figure.replaceChildren(h("p", { class: "empty" }, "No common song has a value."), tip);
      return;
    }
    const style = getComputedStyle(figure);
    const width = figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    if (width < 150) return;
    const steps = shown.map((song) => song.step);
    const { low, high, size, digits } = axis(steps, pair);
    const [left, right, top, height] = [48, width - 6, 26, width < 560 ? 300 : 380];
    const bottom = height - 26;
    const y = (value) => bottom - ((within(value, low, high) - low) / (high - low)) * (bottom - top);
    const x = (place) => left + ((place + 0.5) * (right - left)) / shown.length;
    const radius = within(((right - left) / shown.length) * 0.45, 2.5, 5);
    const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Differences of ${shown.length} songs` });
    if (pair.low != null) drawing.append(s("rect", { class: "band", x: left, width: right - left, y: y(pair.high), height: Math.max(y(pair.low) - y(pair.high), 1) }));
    for (let step = Math.round(low / size); step <= Math.round(high / size); step++) {
      const place = y(step * size);
      drawing.append(
        s("line", { class: step === 0 ? "zero" : "grid", x1: left, x2: right, y1: place, y2: place }),
        s("text", { x: left - 8, y: place + 4, "text-anchor": "end" }, step === 0 ? "0" : signed(step * size, digits)),
      );
    }
    drawing.append(s("line", { class: "middle", x1: left, x2: right, y1: y(pair.difference), y2: y(pair.difference) }));
    const up = metric().higher ? 1 : 0;
    drawing.append(
      s("text", { class: `side of-${"ab"[up]}`, x: left, y: 13 }, `↑ ${names[up]} is better`),
      s("text", { class: `side of-${"ab"[1 - up]}`, x: left, y: height - 4 }, `↓ ${names[1 - up]} is better`),
    );
    const dots = s("g", { role: "group", "aria-label": "songs" });
    shown.forEach((song, place) => {
      const better = Math.abs(song.step) < 0.005 ? "tie" : song.step > 0 === metric().higher ? "of-b" : "of-a";
      const off = song.step < low || song.step > high;
      dots.append(
        s("circle", {
          class: `${better}${off ? " off" : ""}`, cx: x(place).toFixed(1), cy: y(song.step).toFixed(1), r: radius.toFixed(1), role: "img", "data-place": place,
          tabindex: place === Math.floor(shown.length / 2) ? 0 : -1,
          "aria-label": `${song.name}: ${withUnit(signed(song.step))}, ${names[0]} ${score(song.a)}, ${names[1]} ${score(song.b)}`,
        }),
      );
    });
    drawing.append(dots);
    const beyond = steps.filter((step) => step < low || step > high).length;
    const caption = beyond ? [h("figcaption", {}, `${beyond} ${beyond === 1 ? "song is" : "songs are"} outside the axis (hollow dots at its ends).`)] : [];
    figure.replaceChildren(drawing, ...caption, tip);
  }

  function fillSongs(names) {
    find("song-heads").replaceChildren(
      h("th", { scope: "col" }, "song"),
      ...(names.length ? [...names, "difference"] : []).map((name) => h("th", { scope: "col", class: "number" }, name)),
    );
    find("song-rows").replaceChildren(
      ...shown.map((song) =>
        h("tr", {}, h("th", { scope: "row" }, song.name), ...[score(song.a), score(song.b), signed(song.step)].map((text) => h("td", { class: "number" }, text))),
      ),
    );
  }

  function showTip(dot) {
    tip.hidden = !dot;
    if (!dot) return;
    const song = shown[dot.dataset.place];
    const pair = chosen();
    tip.replaceChildren(song.name, h("br"), h("b", {}, withUnit(signed(song.step))), h("br"), `${systems[pair.a].name} ${score(song.a)}, ${systems[pair.b].name} ${score(song.b)}`);
    const frame = find("spread").getBoundingClientRect();
    const box = dot.getBoundingClientRect();
    const half = tip.offsetWidth / 2;
    tip.style.left = `${within(box.x + box.width / 2 - frame.x, half + 4, frame.width - half - 4)}px`;
    tip.style.top = `${Math.max(box.y - frame.y, tip.offsetHeight + 12)}px`;
  }

  const figure = find("spread");
  if (figure) {
    const dotOf = (event) => event.target.closest("circle");
    const nearest = (event) => {
      const dots = [...figure.querySelectorAll("circle")];
      const far = (dot) => Math.abs(dot.getBoundingClientRect().x + dot.getBoundingClientRect().width / 2 - event.clientX);
      return dots.length ? dots.reduce((best, dot) => (far(dot) < far(best) ? dot : best)) : null;
    };
    figure.addEventListener("pointermove", (event) => showTip(dotOf(event) ?? (event.target.closest("svg") && nearest(event))));
    figure.addEventListener("pointerdown", (event) => showTip(dotOf(event) ?? (event.target.closest("svg") && nearest(event))));
    figure.addEventListener("pointerleave", () => showTip(null));
    figure.addEventListener("focusin", (event) => showTip(dotOf(event)));
    figure.addEventListener("focusout", () => showTip(null));
    // Tab reaches one dot; arrow keys reach the others.
    figure.addEventListener("keydown", (event) => {
      const dot = dotOf(event);
      const dots = [...figure.querySelectorAll("circle")];
      const to = { ArrowRight: 1, ArrowLeft: -1, Home: -dots.length, End: dots.length }[event.key];
      if (!dot || !to) return;
      const next = dots[within(dots.indexOf(dot) + to, 0, dots.length - 1)];
      dot.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
      event.preventDefault();
    });
  }

  function update() {
    fill();
    again();
    if (!figure) return;
    fillPairs();
    draw();
  }

  find("metric").addEventListener("change", () => {
    find("statistic").value = metric().statistic;
    update();
  });
  for (const id of ["statistic", "stem", "pair"]) find(id)?.addEventListener("change", update);
  let wait = 0;
  addEventListener("resize", () => {
    clearTimeout(wait);
    wait = setTimeout(() => figure && draw(), 100);
  });
  update();
})();
