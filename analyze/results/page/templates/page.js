"use strict";
// Content goes in as text, never as HTML, since people other than the reader wrote it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { layers, latents, columns, profile, counts, names } = data;
  const numLayers = layers.length;
  const ROWS = 50;
  const SVG = "http://www.w3.org/2000/svg";
  const KINDS = [
    "Strongest examples",
    "Random examples from ranges of values",
    "Strongest example at a layer",
  ];
  const RANGES = ["density", "layer_mean", "layer_std", "num_layers", "layer_entropy", "token_entropy"];

  const placeOf = new Map(latents.map((latent, place) => [latent, place]));
  const examplesOf = new Map();
  for (const example of data.examples ?? []) {
    if (!examplesOf.has(example[0])) examplesOf.set(example[0], []);
    examplesOf.get(example[0]).push(example);
  }
  const state = { sort: "density", down: true, first: 0, shown: [], open: new Set() };

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") element.addEventListener("click", value);
      else if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function drawn(tag, attributes, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function text(value) {
    if (value === null) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en-US").replace("-", "−");
    return String(Number(value.toPrecision(4))).replace("-", "−");
  }

  // Bars by layer; `shares` are of `most`.
  function strip(shares, most, label) {
    const wide = Math.max(2, Math.min(10, Math.floor(160 / shares.length)));
    const high = 18;
    const picture = drawn("svg", {
      class: "strip",
      width: wide * shares.length,
      height: high,
      viewBox: `0 0 ${wide * shares.length} ${high}`,
      role: "img",
      "aria-label": label,
    });
    picture.append(drawn("rect", { class: "ground", x: 0, y: high - 1, width: wide * shares.length, height: 1 }));
    shares.forEach((share, at) => {
      const tall = share > 0 ? Math.max(1.5, (share / most) * (high - 1)) : 0;
      if (tall > 0) {
        picture.append(
          drawn("rect", { x: at * wide + 0.5, y: high - tall, width: wide - 1, height: tall }),
        );
      }
    });
    return picture;
  }

  function profileOf(place) {
    return profile.slice(place * numLayers, (place + 1) * numLayers);
  }

  function inWords(shares) {
    return shares
      .map((share, at) => [share, at])
      .filter(([share]) => share > 0)
      .map(([share, at]) => `layer ${layers[at]} ${text(share / 10)}%`)
      .join(", ") || "dead";
  }

  // ---- one latent

  function visible(piece) {
    return piece
      .replaceAll("\n", "⏎")
      .replaceAll("\t", "⇥")
      .replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      // Others that have no shape would hide, or turn round the tokens behind them (U+202E); two
      // join letters.
      .replace(/[\p{C}\u2028\u2029]/gu, (c) => (/[\u200c\u200d]/.test(c) ? c : "\ufffd"));
  }

  function exampleItem([, , quantile, layer, token, value, peak, pieces, active, byLayer]) {
    const heat = new Map();
    for (let at = 0; at < active.length; at += 2) heat.set(active[at], active[at + 1]);
    const line = make("p", { class: "text", dir: "auto" });
    pieces.forEach((piece, at) => {
      const share = heat.get(at) ?? 0;
      const level = share > 0 ? Math.max(1, Math.round(share / 10)) : 0;
      const shown = visible(data.pieces[piece]);
      if (level === 0 && at !== peak) {
        line.append(shown);
        return;
      }
      line.append(
        make(at === peak ? "mark" : "span", {
          class: `h${level}`,
          title: at === peak ? `the peak: ${text(value)}` : `${share}% of the largest value shown`,
        }, shown),
      );
    });
    const where = `layer ${layer}, value ${text(value)}, sequence ` +
      `${text(Math.floor(token / data.context_length))}, position ${token % data.context_length}`;
    const range = quantile === null ? "" : `, range ${quantile}`;
    const shares = byLayer.length === numLayers ? byLayer : [];
    const words = shares.map((share, at) => `layer ${layers[at]} ${share}%`).join(", ");
    return make("li", {}, line, make("p", { class: "where" },
      strip(shares, 100, `value at the peak: ${words}`), ` ${where}${range}`));
  }

  function examplesBox(latent) {
    const box = make("div", { class: "examples" });
    if (data.examples === undefined) {
      box.append(make("p", {}, "This analysis has no table of examples."));
      return box;
    }
    const mine = examplesOf.get(latent) ?? [];
    if (mine.length === 0) box.append(make("p", {}, "This page holds no example of the latent."));
    KINDS.forEach((title, kind) => {
      const some = mine.filter((example) => example[1] === kind);
      if (some.length > 0) {
        box.append(make("h4", {}, title), make("ol", {}, ...some.map(exampleItem)));
      }
    });
    if (mine.length > 0) {
      box.append(make("p", { class: "fine" },
        "The peak is underlined; other tokens are shaded by the latent’s value at the same layer. " +
        "The strip beside an example shows the value at the peak, by layer."));
    }
    return box;
  }

  function barsBox(place) {
    const list = make("ul", { class: "bars" });
    profileOf(place).forEach((share, at) => {
      const bar = drawn("svg", { class: "bar", width: 100, height: 10, "aria-hidden": "true" },
        drawn("rect", { x: 0, y: 0, width: share / 10, height: 10 }));
      const rows = text(counts[place * numLayers + at]);
      list.append(make("li", {}, make("span", { class: "name" }, `layer ${layers[at]}`), bar,
        make("span", { class: "share" }, `${text(share / 10)}%`),
        make("span", { class: "rows" }, `${rows} rows`)));
    });
    return list;
  }

  function factsBox(place) {
    const facts = make("dl", { class: "pairs" });
    for (const [name, values] of Object.entries(columns)) {
      const value = values[place];
      let shown = text(value);
      if (name === "decoder_latent" && value !== null) {
        shown = placeOf.has(value) ? make("a", { href: `#latent-${value}` }, shown) : shown;
      }
      facts.append(make("div", {}, make("dt", { title: data.about[name] ?? null },
        make("code", {}, name)), make("dd", {}, shown)));
    }
    return facts;
  }

  function detailRow(place, width) {
    const latent = latents[place];
    const box = make("div", { class: "detail-box" },
      make("h3", {}, `Latent ${latent} `, make("a", { href: `#latent-${latent}` }, "link")),
      make("div", { class: "two" }, barsBox(place), factsBox(place)),
      examplesBox(latent));
    return make("tr", { class: "detail", id: `detail-${latent}` },
      make("td", { colspan: width }, box));
  }

  // ---- the list

  const shownColumns = Object.keys(names);
  const head = document.querySelector("#list thead");
  const body = document.querySelector("#list tbody");
  const status = document.getElementById("status");
  const pager = document.getElementById("pager");
  const form = document.getElementById("filters");

  function valuesOf(name) {
    return name === "latent" ? latents : columns[name];
  }

  function sortBy(name) {
    state.down = state.sort === name ? !state.down : name !== "latent";
    state.sort = name;
    state.first = 0;
    refresh();
  }

  const headers = new Map();
  function makeHead() {
    const row = make("tr");
    const add = (name, label) => {
      const header = make("th", { scope: "col", title: data.about[name] ?? null },
        make("button", { type: "button", onclick: () => sortBy(name) }, label));
      headers.set(name, header);
      row.append(header);
    };
    add("latent", "latent");
    row.append(make("th", { scope: "col" }, "by layer"));
    for (const name of shownColumns) add(name, names[name]);
    head.append(row);
  }

  function toggle(place) {
    const latent = latents[place];
    if (!state.open.delete(latent)) state.open.add(latent);
    const row = document.getElementById(`latent-${latent}`);
    const opened = state.open.has(latent);
    row.querySelector("button").setAttribute("aria-expanded", opened);
    const detail = document.getElementById(`detail-${latent}`);
    if (detail !== null) detail.remove();
    if (opened) row.after(detailRow(place, shownColumns.length + 2));
  }

  function listRow(place) {
    const latent = latents[place];
    const shares = profileOf(place);
    const row = make("tr", { class: "latent", id: `latent-${latent}` },
      make("th", { scope: "row" }, make("button", {
        type: "button",
        "aria-expanded": state.open.has(latent),
        "aria-controls": `detail-${latent}`,
        "aria-label": `latent ${latent}`,
      }, String(latent))),
      make("td", { class: "profile" }, strip(shares, Math.max(1, ...shares), inWords(shares))),
      ...shownColumns.map((name) => make("td", {}, text(columns[name][place]))));
    row.addEventListener("click", () => toggle(place));
    return row;
  }

  function refresh() {
    const values = valuesOf(state.sort);
    const sign = state.down ? -1 : 1;
    state.shown = latents.map((_, place) => place).filter(passes);
    state.shown.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === y) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      return sign * (x - y);
    });
    for (const [name, header] of headers) {
      const order = state.down ? "descending" : "ascending";
      if (name === state.sort) header.setAttribute("aria-sort", order);
      else header.removeAttribute("aria-sort");
    }
    render();
  }

  function render() {
    const few = state.shown.slice(state.first, state.first + ROWS);
    const rows = [];
    for (const place of few) {
      rows.push(listRow(place));
      if (state.open.has(latents[place])) rows.push(detailRow(place, shownColumns.length + 2));
    }
    body.replaceChildren(...rows);
    const total = state.shown.length;
    const last = Math.min(state.first + ROWS, total);
    status.textContent = total === 0
      ? "No latent passes these filters."
      : `${text(state.first + 1)} to ${text(last)} of ${text(total)} latents` +
        (total < latents.length ? ` (${text(latents.length)} without these filters)` : "");
    pager.replaceChildren(
      turn("Previous", state.first - ROWS, state.first > 0),
      turn("Next", state.first + ROWS, last < total),
    );
  }

  function turn(label, first, possible) {
    const button = make("button", { type: "button", onclick: () => {
      state.first = Math.max(0, first);
      render();
      document.getElementById("latents").scrollIntoView();
    } }, label);
    button.disabled = !possible;
    return button;
  }

  // ---- filters

  const fields = { ranges: new Map() };

  function field(label, input, ...more) {
    return make("label", {}, make("span", {}, label), input, ...more);
  }

  function makeFilters() {
    fields.ids = make("input", { type: "text", name: "latents", placeholder: "3, 17", inputmode: "numeric" });
    form.append(field("latents", fields.ids));
    if (data.examples !== undefined) {
      fields.text = make("input", { type: "search", name: "text" });
      form.append(field("text in examples", fields.text));
    }
    for (const name of RANGES) {
      const ends = ["from", "to"].map((end) => make("input", {
        type: "number", step: "any", name: `${name}-${end}`, placeholder: end,
        "aria-label": `${names[name]} ${end}`,
      }));
      fields.ranges.set(name, ends);
      form.append(make("fieldset", {}, make("legend", {}, names[name]), ...ends));
    }
    form.append(make("button", { type: "reset" }, "Clear"));
    const changed = () => {
      readFilters();
      state.first = 0;
      refresh();
    };
    form.addEventListener("input", changed);
    form.addEventListener("reset", () => setTimeout(changed));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  let wanted = { ids: null, text: "", ranges: [] };
  function readFilters() {
    const ids = fields.ids.value.match(/\d+/g);
    const ranges = [];
    for (const [name, [from, to]] of fields.ranges) {
      if (from.value !== "" || to.value !== "") {
        ranges.push([
          columns[name],
          from.value === "" ? -Infinity : Number(from.value),
          to.value === "" ? Infinity : Number(to.value),
        ]);
      }
    }
    wanted = {
      ids: ids === null ? null : new Set(ids.map(Number)),
      text: fields.text === undefined ? "" : fields.text.value.toLowerCase(),
      ranges,
    };
  }

  const joined = new Map();
  function textsOf(latent) {
    if (!joined.has(latent)) {
      const mine = examplesOf.get(latent) ?? [];
      const texts = mine.map((example) => example[7].map((piece) => data.pieces[piece]).join(""));
      joined.set(latent, texts.map((one) => one.toLowerCase()));
    }
    return joined.get(latent);
  }

  function passes(place) {
    const latent = latents[place];
    if (wanted.ids !== null && !wanted.ids.has(latent)) return false;
    for (const [values, from, to] of wanted.ranges) {
      const value = values[place];
      if (value === null || value < from || value > to) return false;
    }
    return wanted.text === "" || textsOf(latent).some((one) => one.includes(wanted.text));
  }

  // ---- links to one latent

  function goToNamed() {
    const found = /^#latent-(\d+)$/.exec(location.hash);
    if (found === null || !placeOf.has(Number(found[1]))) return;
    const latent = Number(found[1]);
    const place = placeOf.get(latent);
    if (!state.shown.includes(place)) {
      for (const input of form.querySelectorAll("input")) input.value = "";
      readFilters();
      refresh();
    }
    state.first = Math.floor(state.shown.indexOf(place) / ROWS) * ROWS;
    state.open.add(latent);
    render();
    const row = document.getElementById(`latent-${latent}`);
    row.scrollIntoView();
    row.querySelector("button").focus({ preventScroll: true });
  }

  makeHead();
  makeFilters();
  refresh();
  window.addEventListener("hashchange", goToNamed);
  goToNamed();
})();
