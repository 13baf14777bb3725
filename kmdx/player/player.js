"use strict";
// A player for the tracks of a song: one clock, waveforms drawn by wavesurfer.js, mute, solo, level, loop.
//
// kmdxPlayer(container, data, { keys, onMove }) builds it in an element. `keys` is the element whose keys control
// it; `onMove` is called with the position in seconds. `destroy()` removes it.
// data: { duration (s), rate (Hz), segment (s), margin (s), sides: {a, b}, tracks: [track] }.
// track: { name, key, side, mark (name of a color), peaks (0 to 1), muted, picture } and either
//   segments: addresses of encoded sound, each `segment` seconds long plus `margin` on both sides. An address
//             is a URL, a data URI, or "#id" of an element with base64 in it. Tracks stay in step to the sample.
//   media:    the URL of a whole file for an audio element. A page on disk cannot read other files, but its
//             audio elements can play them. They are kept in step to about DRIFT seconds.
// Of the two sides one is heard at a time, so that they can be compared. Tracks with one key are soloed together.
const kmdxPlayer = (() => {
  const FADE = 0.01; // s: between two segments, and wherever sound starts or ends
  const LEAD = 0.06; // s: from a decision to the sound
  const AHEAD = 2; // s: sound is scheduled this long in advance
  const DRIFT = 0.04; // s: audio elements further apart than this are moved
  const SEGMENTS = 4; // decoded segments kept per track
  const SKIP = 5; // s: of the arrow keys
  const SHORTEST_LOOP = 0.1; // s
  const KNOWN = ["bass", "drums", "other", "vocals", "guitar", "piano", "accompaniment", "song"];

  // Strings become text, never HTML, because the names of stems and songs may contain anything.
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }

  const within = (value, low, high) => Math.min(Math.max(value, low), high);

  function clock(seconds, digits = 1) {
    const unit = 10 ** digits;
    const whole = Math.floor(seconds * unit + 1e-6);
    const rest = ((whole % (60 * unit)) / unit).toFixed(digits).padStart(digits ? digits + 3 : 2, "0");
    return `${Math.floor(whole / (60 * unit))}:${rest}`;
  }

  // Seconds from "83.5" or "1:23.5"; NaN from anything else.
  function seconds(text) {
    const parts = text.trim().split(":");
    if (parts.length > 3 || !parts.every((part) => /^\d+([.,]\d*)?$/.test(part))) return NaN;
    return parts.reduce((sum, part) => 60 * sum + Number(part.replace(",", ".")), 0);
  }

  async function bytes(address) {
    const inline = address.startsWith("#") ? document.getElementById(address.slice(1)).textContent : /^data:[^,]*;base64,(.*)$/s.exec(address)?.[1];
    if (inline !== undefined) return Uint8Array.from(atob(inline), (character) => character.charCodeAt(0)).buffer;
    const reply = await fetch(address);
    if (!reply.ok) throw new Error(`${address}: ${reply.status} ${reply.statusText}`);
    return reply.arrayBuffer();
  }

  // Plays segments with Web Audio: every track of a segment starts at the same time of the context's clock.
  class Segments {
    constructor(data, tracks, transport) {
      Object.assign(this, { data, tracks, transport, context: null, run: null, decoded: new Map() });
      this.count = Math.max(1, Math.ceil(data.duration / data.segment - 1e-9));
    }

    open() {
      try {
        this.context = new AudioContext({ sampleRate: this.data.rate });
      } catch {
        this.context = new AudioContext(); // a rate that this browser does not support: it resamples
      }
      for (const track of this.tracks) {
        track.node = this.context.createGain();
        track.node.gain.value = track.gain;
        track.node.connect(this.context.destination);
      }
    }

    async start(position) {
      if (!this.context) this.open();
      const run = { next: { time: 0, position }, from: position, pieces: [], live: new Set(), busy: false, done: false };
      this.run = run;
      await this.context.resume();
      run.timer = setInterval(() => this.fill(run), 100);
      if (run !== this.run) clearInterval(run.timer); // stopped meanwhile
      await this.fill(run);
    }

    stop() {
      const run = this.run;
      if (!run) return;
      this.run = null;
      clearInterval(run.timer);
      const now = this.context.currentTime;
      for (const { source, fade } of run.live) {
        fade.gain.cancelScheduledValues(now);
        fade.gain.setTargetAtTime(0, now, FADE / 4);
        source.stop(now + 2 * FADE);
      }
    }

    async fill(run) {
      if (run.busy || run !== this.run) return;
      run.busy = true;
      try {
        while (run === this.run && !run.done && run.next.time < this.context.currentTime + AHEAD) await this.add(run);
      } catch (error) {
        if (run === this.run) this.transport.fail(error);
      } finally {
        run.busy = false;
      }
      if (run === this.run && run.done && this.context.currentTime >= run.next.time) this.transport.finish();
    }

    // Schedule what follows, up to the end of its segment, of the loop or of the song.
    async add(run) {
      const { duration, segment, margin = 0 } = this.data;
      const { position } = run.next;
      const { loop } = this.transport;
      const stop = loop && position < loop.end ? loop.end : duration;
      const index = Math.min(Math.floor(position / segment + 1e-9), this.count - 1);
      const end = Math.min(index + 1 < this.count ? (index + 1) * segment : duration, stop);
      const buffers = await Promise.all(this.tracks.map((track) => this.buffer(track, index)));
      if (run !== this.run) return;
      const time = Math.max(run.next.time, this.context.currentTime + LEAD);
      this.tracks.forEach((track, at) => this.play(run, track, buffers[at], time, margin + position - index * segment, end - position));
      run.pieces.push({ time, position, length: end - position });
      if (run.pieces.length > 50) run.pieces.shift();
      const atStop = end >= stop - 1e-9;
      run.next = { time: time + end - position, position: atStop && loop && stop === loop.end ? loop.start : end };
      run.done = atStop && run.next.position === end;
      const following = Math.min(Math.floor(run.next.position / segment + 1e-9), this.count - 1);
      for (const track of this.tracks) this.buffer(track, following).catch(() => {}); // reported when it is needed
    }

    play(run, track, buffer, time, offset, length) {
      const source = this.context.createBufferSource();
      const fade = this.context.createGain();
      const ramp = Math.min(FADE, length / 2);
      source.buffer = buffer;
      fade.gain.setValueAtTime(0, time);
      fade.gain.linearRampToValueAtTime(1, time + ramp);
      fade.gain.setValueAtTime(1, time + length);
      fade.gain.linearRampToValueAtTime(0, time + length + ramp);
      source.connect(fade).connect(track.node);
      source.start(time, offset);
      source.stop(time + length + ramp);
      const piece = { source, fade };
      run.live.add(piece);
      source.onended = () => {
        fade.disconnect();
        run.live.delete(piece);
      };
    }

    buffer(track, index) {
      const key = `${this.tracks.indexOf(track)} ${index}`;
      const known = this.decoded.get(key);
      this.decoded.delete(key); // the last used are at the end
      const found = known ?? bytes(track.segments[index]).then((data) => this.context.decodeAudioData(data));
      this.decoded.set(key, found);
      for (const oldest of this.decoded.keys()) {
        if (this.decoded.size <= SEGMENTS * this.tracks.length) break;
        this.decoded.delete(oldest);
      }
      return found;
    }

    position() {
      const { run } = this;
      if (!run) return this.transport.time;
      const now = this.context.currentTime - (this.context.outputLatency || 0);
      const piece = run.pieces.findLast((one) => one.time <= now);
      return piece ? piece.position + Math.min(now - piece.time, piece.length) : run.pieces[0]?.position ?? run.from;
    }

    setGain(track) {
      track.node?.gain.setTargetAtTime(track.gain, this.context.currentTime, FADE);
    }

    close() {
      this.stop();
      this.context?.close();
      this.decoded.clear();
    }
  }

  // Plays whole files with audio elements. The first element's clock is everyone's.
  class Elements {
    constructor(data, tracks, transport) {
      Object.assign(this, { data, tracks, transport, timer: null });
      for (const track of tracks) {
        track.element = h("audio", { preload: "metadata", src: track.media });
        track.element.addEventListener("error", () => transport.fail(new Error(`${track.name} cannot be played`)));
      }
      this.first = tracks[0].element;
      this.first.addEventListener("ended", () => !transport.paused && (transport.loop ? this.seek(transport.loop.start) : transport.finish()));
    }

    seek(position) {
      for (const { element } of this.tracks) element.currentTime = position;
      for (const { element } of this.tracks) if (element.paused) element.play().catch(() => {});
    }

    async start(position) {
      for (const { element } of this.tracks) element.currentTime = position;
      this.timer = setInterval(() => this.check(), 50);
      const results = await Promise.allSettled(this.tracks.map(({ element }) => element.play()));
      const failed = results.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
      if (failed) throw failed.reason;
    }

    check() {
      const { loop } = this.transport;
      const time = this.first.currentTime;
      if (loop && time >= loop.end) return this.seek(loop.start);
      for (const { element } of this.tracks) {
        if (!element.seeking && !element.ended && Math.abs(element.currentTime - time) > DRIFT) element.currentTime = time;
      }
    }

    stop() {
      clearInterval(this.timer);
      for (const { element } of this.tracks) element.pause();
    }

    position() {
      return this.first.currentTime;
    }

    setGain(track) {
      track.element.volume = Math.min(track.gain, 1);
      track.element.muted = track.gain === 0;
    }

    close() {
      this.stop();
      for (const { element } of this.tracks) {
        element.removeAttribute("src");
        element.load();
      }
    }
  }

  // The clock of all tracks. To wavesurfer.js it looks like an audio element.
  class Transport extends EventTarget {
    constructor(data, tracks) {
      super();
      Object.assign(this, { duration: data.duration, paused: true, ended: false, seeking: false, loop: null, time: 0 });
      Object.assign(this, { readyState: 4, volume: 1, muted: false, playbackRate: 1, src: "", currentSrc: "" });
      this.output = new (tracks.every((track) => track.segments) ? Segments : Elements)(data, tracks, this);
    }

    say(name) {
      this.dispatchEvent(new Event(name));
    }

    get currentTime() {
      return this.paused ? this.time : within(this.output.position(), 0, this.duration);
    }

    set currentTime(time) {
      if (!Number.isFinite(time)) return;
      const playing = !this.paused;
      if (playing) this.output.stop();
      this.time = within(time, 0, this.duration);
      this.ended = false;
      if (playing) this.begin();
      for (const name of ["seeking", "timeupdate", "seeked"]) this.say(name);
    }

    begin() {
      return this.output.start(this.time).catch((error) => this.fail(error));
    }

    async play() {
      if (!this.paused) return;
      if (this.time >= this.duration - 0.01) this.time = 0;
      if (this.loop && !(this.time >= this.loop.start && this.time < this.loop.end)) this.time = this.loop.start;
      this.paused = this.ended = false;
      const begun = this.begin();
      this.say("play");
      await begun;
    }

    pause() {
      if (this.paused) return;
      this.time = this.currentTime;
      this.output.stop();
      this.paused = true;
      this.say("timeupdate");
      this.say("pause");
    }

    finish() {
      this.pause();
      this.time = this.duration;
      this.ended = true;
      this.say("timeupdate");
      this.say("ended");
    }

    fail(error) {
      this.pause();
      this.error = error;
      this.say("failed");
    }

    setLoop(loop) {
      const time = this.currentTime;
      this.loop = loop;
      const isOutside = loop && !(time >= loop.start && time < loop.end);
      if (!this.paused) this.currentTime = isOutside ? loop.start : time;
      this.say("loopchange");
    }

    // The rest of what wavesurfer.js asks of an audio element.
    load() {}
    remove() {}
    removeAttribute() {}
    canPlayType() {
      return "";
    }
  }

  class Player {
    constructor(container, data, { keys = document, onMove = () => {} } = {}) {
      Object.assign(this, { data, onMove });
      this.tracks = data.tracks.map((spec, index) => ({ key: spec.name, side: "a", muted: false, ...spec, index, soloed: false, level: 1, gain: 1 }));
      this.side = "a";
      this.abort = new AbortController();
      this.waves = [];
      this.region = null;
      this.transport = new Transport(data, this.tracks);
      this.build(container);
      this.follow();
      this.drawWaves();
      this.listen(keys);
      this.update();
      this.move();
    }

    // ------------------------------------------------------------------------------ the page

    button(text, label, keys, action, pressed = null) {
      const button = h("button", { type: "button", "aria-label": label, title: keys ? `${label} (${keys})` : label, "aria-pressed": pressed }, text);
      button.addEventListener("click", action);
      return button;
    }

    build(container) {
      const { sides = { a: "Stems", b: "Original" } } = this.data;
      const isCompared = this.tracks.some((track) => track.side === "b");
      const small = this.tracks.length <= 10;
      this.playButton = this.button("", "Play", "Space", () => this.toggle());
      this.playButton.className = "kp-play";
      this.time = h("span", { class: "kp-time", role: "timer" }); // whose changes screen readers do not announce
      this.sideButtons = isCompared ? ["a", "b"].map((side) => this.button(sides[side], `Listen to: ${sides[side]}`, "O", () => this.choose(side), "false")) : [];
      this.loopButton = this.button("Loop", "Loop", "L", () => this.toggleLoop(), "false");
      [this.from, this.to] = ["start", "end"].map((what) => {
        const input = h("input", { type: "text", size: 7, placeholder: "m:ss.s", "aria-label": `Loop ${what}`, title: `Loop ${what} (${what === "start" ? "[" : "]"} sets it to the position)` });
        input.addEventListener("change", () => this.readLoop());
        return input;
      });
      const hasPictures = this.tracks.some((track) => track.picture);
      this.pictureButton = hasPictures ? this.button("Spectrograms", "Show spectrograms", "S", () => this.showPictures(!this.hasPictures), "false") : null;
      this.status = h("p", { class: "kp-status", role: "status" });
      this.overview = h("div", { class: "kp-overview" });
      this.slider = h("input", { type: "range", class: "kp-position", min: 0, max: this.data.duration, step: 0.01, value: 0, "aria-label": "Position" });
      this.slider.addEventListener("input", () => (this.transport.currentTime = Number(this.slider.value)));
      const group = (name, label, ...parts) => h("div", { class: name, role: "group", "aria-label": label }, ...parts);
      this.root = h(
        "div",
        { class: "kmdx-player", role: "region", "aria-label": "Player" },
        h(
          "div",
          { class: "kp-top" },
          h(
            "div",
            { class: "kp-bar" },
            this.playButton,
            this.time,
            isCompared ? group("kp-sides", "Listen to", this.sideButtons) : null,
            group("kp-loop", "Loop", this.loopButton, this.from, h("span", { "aria-hidden": "true" }, "–"), this.to),
            this.pictureButton,
          ),
          this.overview,
          this.slider,
        ),
        this.status,
        ...this.tracks.map((track) => this.row(track)),
        this.help(isCompared, sides, hasPictures),
      );
      container.replaceChildren(this.root);
      this.showPictures(hasPictures && small);
    }

    row(track) {
      track.muteButton = this.button("M", `Mute ${track.name}`, track.index < 9 ? `Shift+${track.index + 1}` : "", () => this.mute(track), "false");
      track.soloButton = this.button("S", `Solo ${track.name}`, track.index < 9 ? `${track.index + 1}` : "", () => this.solo(track), "false");
      const level = h("input", { type: "range", min: 0, max: 100, step: 1, value: 100, "aria-label": `Level of ${track.name}`, title: "Level" });
      level.addEventListener("input", () => {
        track.level = level.value / 100;
        this.update();
      });
      track.wave = h("div", { class: "kp-wave" });
      const image = track.picture ? h("img", { src: track.picture, alt: `Spectrogram of ${track.name}`, draggable: "false" }) : null;
      const picture = image && h("div", { class: "kp-picture" }, image);
      picture?.addEventListener("click", (event) => {
        const box = picture.getBoundingClientRect();
        this.transport.currentTime = ((event.clientX - box.x) / box.width) * this.data.duration;
      });
      track.row = h(
        "div",
        { class: "kp-track", role: "group", "aria-label": track.name },
        h("div", { class: "kp-head" }, h("h3", { title: track.name }, track.name), h("div", { class: "kp-buttons" }, track.muteButton, track.soloButton, level)),
        h("div", { class: "kp-body" }, track.wave, picture),
        track.element ?? null,
      );
      const mark = track.mark ?? track.key;
      const color = KNOWN.includes(mark) ? `var(--${mark})` : `hsl(${(track.index * 137.5 + 20) % 360} 45% 52%)`;
      track.row.style.setProperty("--mark", color);
      return track.row;
    }

    help(isCompared, sides, hasPictures) {
      const keys = [
        ["Space", "play or pause"],
        ["← →", `${SKIP} s back or forward`],
        ["Home", "to the start"],
        ["1 … 9", "solo a track"],
        ["Shift+1 … 9", "mute a track"],
        isCompared ? ["O", `${sides.a} or ${sides.b}`] : null,
        ["L", "loop on or off"],
        ["[ ]", "loop start or end here"],
        hasPictures ? ["S", "spectrograms"] : null,
      ].filter((line) => line);
      const list = keys.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)));
      return h("details", { class: "kp-help" }, h("summary", {}, "Keys"), h("p", {}, "Drag across the topmost waveform to loop a part."), h("dl", {}, list));
    }

    // ------------------------------------------------------------------------------ waveforms

    style(name, element = this.root) {
      const probe = h("i", { style: `color:${name}`, hidden: true });
      element.append(probe);
      const color = getComputedStyle(probe).color;
      probe.remove();
      return color;
    }

    colors(track) {
      const wave = this.style(track ? "var(--mark)" : "var(--song)", track ? track.row : this.root);
      return { waveColor: wave, progressColor: wave, cursorColor: this.style("var(--ink)") };
    }

    drawWaves() {
      const { duration } = this.data;
      const common = { media: this.transport, duration, cursorWidth: 1, barWidth: 2, barGap: 1, barMinHeight: 1, hideScrollbar: true };
      const loudest = Math.max(...this.tracks.map((track) => Math.max(...track.peaks)), 1e-4);
      this.regions = WaveSurfer.Regions.create();
      const timeline = WaveSurfer.Timeline.create({ height: 18, secondaryLabelOpacity: 1, formatTimeCallback: (time) => clock(time, 0), style: { fontSize: "12px", color: "inherit" } });
      const original = this.tracks.find((track) => track.side === "b" && this.tracks.filter((other) => other.side === "b").length === 1);
      const all = this.tracks.filter((track) => track.side === "a");
      const peaks = original?.peaks ?? all[0].peaks.map((_, at) => Math.hypot(...all.map((track) => track.peaks[at] ?? 0)));
      const wave = WaveSurfer.create({ ...common, ...this.colors(null), container: this.overview, height: 44, peaks: [peaks], normalize: true, plugins: [this.regions, timeline] });
      this.waves.push([null, wave]);
      for (const track of this.tracks) {
        const one = WaveSurfer.create({ ...common, ...this.colors(track), container: track.wave, height: 52, peaks: [track.peaks], maxPeak: loudest, normalize: true, dragToSeek: true });
        this.waves.push([track, one]);
      }
      this.regions.enableDragSelection({ color: "color-mix(in srgb, var(--link) 25%, transparent)" });
      const changed = (region) => {
        if (region === this.region && region.start === this.transport.loop?.start && region.end === this.transport.loop?.end) return;
        if (region !== this.region) this.region?.remove();
        this.region = region;
        this.setLoop(region.start, region.end);
      };
      this.regions.on("region-created", (region) => this.drawing || changed(region));
      this.regions.on("region-updated", changed);
    }

    recolor() {
      for (const [track, wave] of this.waves) wave.setOptions(this.colors(track));
    }

    // ------------------------------------------------------------------------------ what is heard

    update() {
      for (const track of this.tracks) {
        const rivals = this.tracks.filter((other) => other.side === track.side && other.soloed);
        const isSilenced = track.side !== this.side || (rivals.length ? !track.soloed : track.muted);
        track.gain = isSilenced ? 0 : track.level;
        this.transport.output.setGain(track);
        track.row.classList.toggle("kp-silent", track.gain === 0);
        track.muteButton.setAttribute("aria-pressed", String(track.muted));
        track.soloButton.setAttribute("aria-pressed", String(track.soloed));
      }
      this.sideButtons.forEach((button, at) => button.setAttribute("aria-pressed", String("ab"[at] === this.side)));
    }

    choose(side) {
      if (this.sideButtons.length === 0) return;
      this.side = side;
      this.update();
    }

    mute(track) {
      track.muted = !track.muted;
      this.update();
    }

    // Solo a track and those of its key on the other side.
    solo(track) {
      const soloed = !track.soloed;
      for (const other of this.tracks) if (other.key === track.key) other.soloed = soloed;
      if (soloed) this.side = track.side;
      this.update();
    }

    toggle() {
      if (this.transport.paused) this.transport.play();
      else this.transport.pause();
    }

    // ------------------------------------------------------------------------------ loop

    setLoop(start, end) {
      const { duration } = this.data;
      [start, end] = [within(Math.min(start, end), 0, duration), within(Math.max(start, end), 0, duration)];
      if (end - start < SHORTEST_LOOP) end = Math.min(start + SHORTEST_LOOP, duration);
      if (end - start < SHORTEST_LOOP) start = Math.max(0, end - SHORTEST_LOOP);
      this.last = { start, end };
      this.transport.setLoop(this.last);
    }

    toggleLoop() {
      if (this.transport.loop) this.transport.setLoop(null);
      else this.setLoop(this.last?.start ?? 0, this.last?.end ?? this.data.duration);
    }

    readLoop() {
      const [start, end] = [seconds(this.from.value || "0"), seconds(this.to.value || String(this.data.duration))];
      if (Number.isFinite(start) && Number.isFinite(end)) this.setLoop(start, end);
      this.showLoop();
    }

    showLoop() {
      const { loop } = this.transport;
      this.loopButton.setAttribute("aria-pressed", String(loop !== null));
      this.from.value = loop ? clock(loop.start) : "";
      this.to.value = loop ? clock(loop.end) : "";
      this.root.style.setProperty("--from", loop ? loop.start / this.data.duration : 0);
      this.root.style.setProperty("--to", loop ? loop.end / this.data.duration : 0);
      if (!loop) {
        this.region?.remove();
        this.region = null;
      } else if (this.region) {
        this.region.setOptions(loop);
      } else {
        this.drawing = true;
        this.region = this.regions.addRegion({ ...loop, color: "color-mix(in srgb, var(--link) 25%, transparent)" });
        this.drawing = false;
      }
    }

    showPictures(on) {
      this.hasPictures = on;
      this.root.classList.toggle("kp-with-pictures", on);
      this.pictureButton?.setAttribute("aria-pressed", String(on));
    }

    // ------------------------------------------------------------------------------ events

    follow() {
      const on = (name, action) => this.transport.addEventListener(name, action, { signal: this.abort.signal });
      on("play", () => {
        this.status.textContent = "";
        const frame = () => {
          this.move();
          if (!this.transport.paused) this.frame = requestAnimationFrame(frame);
        };
        frame();
      });
      for (const name of ["play", "pause", "ended"]) {
        on(name, () => {
          const label = this.transport.paused ? "Play" : "Pause";
          this.playButton.setAttribute("aria-label", label);
          this.playButton.title = `${label} (Space)`;
          this.root.classList.toggle("kp-playing", !this.transport.paused);
        });
      }
      on("timeupdate", () => this.move());
      on("loopchange", () => this.showLoop());
      on("failed", () => (this.status.textContent = `This cannot be played: ${this.transport.error.message}`));
    }

    move() {
      const time = this.transport.currentTime;
      const text = `${clock(time)} / ${clock(this.data.duration)}`;
      if (this.time.textContent !== text) this.time.textContent = text;
      this.slider.value = time;
      this.slider.setAttribute("aria-valuetext", `${clock(time, 0)} of ${clock(this.data.duration, 0)}`);
      this.root.style.setProperty("--at", time / this.data.duration);
      this.onMove(time);
    }

    listen(keys) {
      const { signal } = this.abort;
      keys.addEventListener("keydown", (event) => this.press(event), { signal });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolor(), { signal });
    }

    press(event) {
      const field = event.target.closest?.("input, select, textarea, summary, button, a");
      // On many keyboards, [ and ] need AltGr and a digit's key; some systems report AltGr as Ctrl+Alt.
      const isBracket = (event.key === "[" || event.key === "]") && !event.metaKey && (!event.ctrlKey || event.altKey);
      const isShortcut = (event.ctrlKey || event.metaKey || event.altKey) && !isBracket;
      if (isShortcut || field?.matches("input[type=text], select, textarea")) return;
      const isRange = field?.matches("input[type=range]");
      const digit = isBracket ? undefined : /^Digit([1-9])$/.exec(event.code)?.[1];
      const track = digit && this.tracks[digit - 1];
      const here = this.transport.currentTime;
      const { loop } = this.transport;
      const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
      const actions = {
        " ": field && !isRange ? null : () => this.toggle(),
        ArrowLeft: isRange ? null : () => (this.transport.currentTime = here - SKIP),
        ArrowRight: isRange ? null : () => (this.transport.currentTime = here + SKIP),
        Home: isRange ? null : () => (this.transport.currentTime = 0),
        o: () => this.choose(this.side === "a" ? "b" : "a"),
        l: () => this.toggleLoop(),
        "[": () => this.setLoop(here, loop && loop.end > here ? loop.end : this.data.duration),
        "]": () => this.setLoop(loop && loop.start < here ? loop.start : 0, here),
        s: this.pictureButton ? () => this.showPictures(!this.hasPictures) : null,
      };
      const action = track ? () => (event.shiftKey ? this.mute(track) : this.solo(track)) : Object.hasOwn(actions, key) ? actions[key] : null;
      if (!action) return;
      event.preventDefault();
      action();
    }

    destroy() {
      this.abort.abort();
      this.transport.pause();
      for (const [, wave] of this.waves) wave.destroy();
      this.transport.output.close();
      this.root.remove();
    }
  }

  return (container, data, options) => new Player(container, data, options);
})();
