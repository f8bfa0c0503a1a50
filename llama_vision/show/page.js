"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const side = data.patches_per_side;
  const perTile = side * side + 1;
  const tokens = data.tokens;

  function bytes(text) {
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  }
  for (const rule of data.rules) {
    for (const stop of rule.stops) {
      stop.stands = new Int32Array(bytes(stop.stands).buffer);
      stop.members = new Map(); // kept token -> all that it stands for
      stop.stands.forEach((kept, token) => {
        if (kept >= 0) {
          if (!stop.members.has(kept)) stop.members.set(kept, []);
          stop.members.get(kept).push(token);
        }
      });
      stop.order = new Map([...stop.members.keys()].sort((a, b) => a - b).map((t, i) => [t, i]));
    }
  }
  const levels = bytes(data.attention);

  const state = { stop: data.rules[0].chosen, token: null };
  let paid = new Float64Array(tokens);
  const figures = [];

  // Of another rule than the one in use: what keeps most nearly as much.
  function stopOf(rule) {
    const first = data.rules[0];
    if (rule === first) return first.stops[state.stop];
    if (state.stop === first.chosen) return rule.stops[rule.chosen];
    const count = first.stops[state.stop].members.size;
    const far = (stop) => Math.abs(stop.members.size - count);
    return rule.stops.reduce((best, stop) => (far(stop) < far(best) ? stop : best));
  }

  function addUp() {
    const chosen = (id, count) =>
      find(id).value === "all" ? [...Array(count).keys()] : [Number(find(id).value)];
    const blocks = chosen("block", data.blocks.length);
    const heads = chosen("head", data.heads);
    const row = Number(find("rows").value);
    paid = new Float64Array(tokens);
    for (const b of blocks) {
      for (const h of heads) {
        const start = ((row * data.blocks.length + b) * data.heads + h) * tokens;
        const most = data.most[row][b][h] / (blocks.length * heads.length);
        for (let t = 0; t < tokens; t++) paid[t] += most * (levels[start + t] / 255) ** 2;
      }
    }
  }

  const colour = (rgb, alpha = 1) => `rgb(${rgb[0]} ${rgb[1]} ${rgb[2]} / ${alpha})`;
  function heat(share) {
    const place = Math.min(Math.max(share, 0), 1) * (data.heat.length - 1);
    const left = Math.min(Math.floor(place), data.heat.length - 2);
    const mixed = data.heat[left].map((a, i) => a + (data.heat[left + 1][i] - a) * (place - left));
    return colour(mixed.map(Math.round));
  }
  const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;

  // Where a token is: of its picture the tile, of that row and column; row null for class tokens.
  function placeOf(picture, token) {
    const own = token - picture.start;
    const tile = Math.floor(own / perTile);
    const patch = own % perTile;
    if (patch === 0) return { tile, row: null, col: null };
    return { tile, row: Math.floor((patch - 1) / side), col: (patch - 1) % side };
  }
  function tokenAt(picture, row, col) {
    const tile = Math.floor(row / side) * picture.cols + Math.floor(col / side);
    return picture.start + tile * perTile + 1 + (row % side) * side + (col % side);
  }
  function pictureOf(token) {
    return data.pictures.findLast((picture) => picture.start <= token);
  }
  function nameOf(token) {
    const picture = pictureOf(token);
    const { tile, row, col } = placeOf(picture, token);
    const which = data.pictures.length > 1 ? `picture ${data.pictures.indexOf(picture) + 1}, ` : "";
    if (row === null) return `${which}class token of tile ${tile + 1}`;
    return `${which}tile ${tile + 1}, row ${row + 1}, column ${col + 1}`;
  }
  function fateOf(stop, token) {
    const kept = stop.stands[token];
    if (kept < 0) return "dropped";
    const size = stop.members.get(kept).length;
    if (kept === token) return size > 1 ? `kept, stands for ${size} tokens` : "kept";
    return `merged into ${nameOf(kept)}; a cluster of ${size} tokens`;
  }

  function read() {
    const reading = find("reading");
    const lines = [];
    const token = state.token;
    if (token === null) {
      lines.push("No patch chosen");
      for (const rule of data.rules) {
        const stop = stopOf(rule);
        const largest = Math.max(...[...stop.members.values()].map((all) => all.length));
        const merged = largest > 1 ? `, the largest cluster has ${largest}` : "";
        lines.push(`${rule.name}: ${stop.members.size} of ${tokens} tokens kept${merged}`);
      }
    } else {
      const name = nameOf(token);
      lines.push(name[0].toUpperCase() + name.slice(1));
      const rank = 1 + paid.reduce((above, other) => above + (other > paid[token]), 0);
      const times = Number((paid[token] * tokens).toPrecision(2));
      lines.push(
        `Attention ${percent(paid[token])}, ${times} times an even share, rank ${rank} of ${tokens}`,
      );
      for (const rule of data.rules) lines.push(`${rule.name}: ${fateOf(stopOf(rule), token)}`);
    }
    reading.replaceChildren(
      ...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })),
    );
  }

  function eachPatch(picture, canvas, does) {
    const rows = picture.rows * side;
    const cols = picture.cols * side;
    const x = (col) => Math.round((col * canvas.width) / cols);
    const y = (row) => Math.round((row * canvas.height) / rows);
    for (let row = 0; row < rows; row++) {
      for (let col = 0; col < cols; col++) {
        const box = [x(col), y(row), x(col + 1) - x(col), y(row + 1) - y(row)];
        does(tokenAt(picture, row, col), box, row, col);
      }
    }
  }

  // Lines along the patches of each set, at edges that no patch of the same set lies behind.
  function outline(figure, setOf, strokeOf, width) {
    const { picture, canvas, context } = figure;
    const rows = picture.rows * side;
    const cols = picture.cols * side;
    const same = (set, row, col) =>
      row >= 0 && col >= 0 && row < rows && col < cols && setOf(tokenAt(picture, row, col)) === set;
    eachPatch(picture, canvas, (token, [x, y, w, h], row, col) => {
      const set = setOf(token);
      if (set === null) return;
      context.fillStyle = strokeOf(set);
      if (!same(set, row - 1, col)) context.fillRect(x, y, w, width);
      if (!same(set, row + 1, col)) context.fillRect(x, y + h - width, w, width);
      if (!same(set, row, col - 1)) context.fillRect(x, y, width, h);
      if (!same(set, row, col + 1)) context.fillRect(x + w - width, y, width, h);
    });
  }

  function drawKept(figure) {
    const { picture, canvas, context, rule } = figure;
    const stop = stopOf(rule);
    context.drawImage(picture.image, 0, 0, canvas.width, canvas.height);
    const merges = stop.stands.some((kept, token) => kept >= 0 && kept !== token);
    context.fillStyle = colour(data.veil, merges ? data.merged : data.dropped);
    eachPatch(picture, canvas, (token, box) => {
      if (stop.stands[token] !== token) context.fillRect(...box);
    });
    const many = (token) => {
      const kept = stop.stands[token];
      return kept >= 0 && stop.members.get(kept).length > 1 ? kept : null;
    };
    const wide = canvas.width / (picture.cols * side);
    const alpha = Math.min(1, Math.max(0.4, wide / devicePixelRatio / 12)); // small ones hide less
    const stroke = (kept) =>
      colour(data.clusters[stop.order.get(kept) % data.clusters.length], alpha);
    outline(figure, many, stroke, Math.max(1, Math.round(wide / 14)));
    figure.key.textContent = !merges
      ? stop.members.size === tokens ? "Nothing is dropped." : "Dimmed: dropped."
      : "Dimmed: merged into a token of the same outline.";
    const own = stop.stands.subarray(picture.start).subarray(0, picture.rows * picture.cols * perTile);
    const count = own.reduce((sum, kept, i) => sum + (kept === picture.start + i), 0);
    figure.count.textContent =
      `${stop.setting}: ${count} of ${own.length} tokens, ` +
      `${Math.round((100 * count) / own.length)} %`;
  }

  function drawAttention(figure) {
    const { picture, canvas, context } = figure;
    let most = 0;
    eachPatch(picture, canvas, (token) => (most = Math.max(most, paid[token])));
    eachPatch(picture, canvas, (token, box) => {
      context.fillStyle = heat(Math.sqrt(paid[token] / (most || 1)));
      context.fillRect(...box);
    });
    context.globalCompositeOperation = "soft-light";
    context.drawImage(picture.grey, 0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-over";
    [0, most / 4, most].forEach((share, i) => (figure.ticks[i].textContent = percent(share)));
  }

  function draw(figure) {
    const { picture, canvas, context, rule } = figure;
    const width = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!width) return;
    canvas.width = width;
    canvas.height = Math.round((width * picture.rows) / picture.cols);
    if (rule) drawKept(figure);
    else drawAttention(figure);
    for (const [shift, shade] of [[-1, "#fff"], [0, "#000"]]) {
      context.fillStyle = shade;
      for (let c = 1; c < picture.cols; c++) {
        const x = Math.round((c * canvas.width) / picture.cols) + shift;
        context.fillRect(x, 0, 1, canvas.height);
      }
      for (let r = 1; r < picture.rows; r++) {
        const y = Math.round((r * canvas.height) / picture.rows) + shift;
        context.fillRect(0, y, canvas.width, 1);
      }
    }
    if (state.token === null) return;
    const kept = rule ? stopOf(rule).stands[state.token] : -1;
    const line = Math.max(2, Math.round(devicePixelRatio * 2));
    if (kept >= 0) {
      const stands = stopOf(rule).stands;
      outline(figure, (t) => (stands[t] === kept ? kept : null), () => "#000", line + 2);
      outline(figure, (t) => (stands[t] === kept ? kept : null), () => "#fff", line);
    }
    outline(figure, (t) => (t === state.token ? t : null), () => "#000", 2 * line);
    outline(figure, (t) => (t === state.token ? t : null), () => "#ffe14d", line);
  }

  let planned = false;
  function redraw() {
    if (planned) return;
    planned = true;
    requestAnimationFrame(() => {
      planned = false;
      figures.forEach(draw);
    });
  }

  function choose(token) {
    if (token === state.token) return;
    state.token = token;
    read();
    redraw();
  }

  function showStop() {
    const first = data.rules[0];
    const stop = first.stops[state.stop];
    const used = state.stop === first.chosen ? ", as in the run" : "";
    const share = Math.round((100 * stop.members.size) / tokens);
    const words = `${stop.members.size} of ${tokens} tokens (${share} %): ${stop.setting}${used}`;
    find("setting").textContent = words;
    find("share").setAttribute("aria-valuetext", words);
    read();
    redraw();
  }

  function showAttention() {
    addUp();
    read();
    redraw();
  }

  function fill(select, options) {
    select.replaceChildren(...options.map(([words, value]) => new Option(words, value)));
  }

  function element(kind, properties = {}, ...children) {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...children);
    return made;
  }

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function byKey(event, picture) {
    const rows = picture.rows * side;
    const cols = picture.cols * side;
    let place = state.token === null ? null : placeOf(pictureOf(state.token), state.token);
    if (place === null || place.row === null || pictureOf(state.token) !== picture) place = null;
    let row = place && Math.floor(place.tile / picture.cols) * side + place.row;
    let col = place && (place.tile % picture.cols) * side + place.col;
    if (event.key === "Escape") {
      choose(null);
    } else if (event.key in STEPS) {
      const [down, along] = STEPS[event.key];
      row = place === null ? 0 : Math.min(Math.max(row + down, 0), rows - 1);
      col = place === null ? 0 : Math.min(Math.max(col + along, 0), cols - 1);
      choose(tokenAt(picture, row, col));
    } else if (event.key === "Home" || event.key === "End") {
      choose(tokenAt(picture, row || 0, event.key === "Home" ? 0 : cols - 1));
    } else {
      return;
    }
    event.preventDefault();
  }

  function byPointer(event, picture, canvas) {
    const box = canvas.getBoundingClientRect();
    const at = (place, length, count) =>
      Math.min(Math.max(Math.floor((place / length) * count), 0), count - 1);
    const row = at(event.clientY - box.top, box.height, picture.rows * side);
    const col = at(event.clientX - box.left, box.width, picture.cols * side);
    choose(tokenAt(picture, row, col));
  }

  function addFigure(grid, picture, rule, name) {
    const canvas = element("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${name}. Arrow keys go from patch to patch.`);
    canvas.setAttribute("aria-describedby", "reading");
    canvas.style.aspectRatio = `${picture.cols} / ${picture.rows}`;
    const most = `calc(85vh * ${picture.cols / picture.rows})`;
    canvas.style.maxWidth = most;
    const figure = { picture, rule, canvas, context: canvas.getContext("2d") };
    const made = element("figure", {}, element("figcaption", { textContent: name }), canvas);
    if (rule) {
      figure.count = element("p", { className: "key" });
      figure.key = element("p", { className: "key" });
      made.append(figure.count, figure.key);
    } else {
      const bar = element("div", { className: "bar" });
      const stops = data.heat.map((rgb) => colour(rgb)).join(", ");
      bar.style.background = `linear-gradient(to right, ${stops})`;
      figure.ticks = [0, 1, 2].map(() => element("span"));
      const ticks = element("div", { className: "ticks" }, ...figure.ticks);
      bar.style.maxWidth = ticks.style.maxWidth = most;
      const key = "Share of a row's attention. Colours go by its square root.";
      made.append(bar, ticks, element("p", { className: "key", textContent: key }));
    }
    canvas.addEventListener("keydown", (event) => byKey(event, picture));
    canvas.addEventListener("pointermove", (event) => byPointer(event, picture, canvas));
    canvas.addEventListener("pointerdown", (event) => byPointer(event, picture, canvas));
    new ResizeObserver(redraw).observe(canvas);
    figures.push(figure);
    grid.append(made);
  }

  function addClassTokens(section, picture) {
    const row = element("div", { className: "classes" });
    row.append(element("span", { className: "key", textContent: "Class tokens of tiles:" }));
    for (let tile = 0; tile < picture.rows * picture.cols; tile++) {
      const button = element("button", { type: "button", textContent: String(tile + 1) });
      button.setAttribute("aria-label", `Class token of tile ${tile + 1}`);
      for (const kind of ["focus", "pointerenter", "click"]) {
        button.addEventListener(kind, () => choose(picture.start + tile * perTile));
      }
      row.append(button);
    }
    section.append(row);
  }

  // Grey, at half of its contrast: laid over the colours it leaves them near those of the legend.
  function greyOf(image) {
    const canvas = element("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [red, green, blue] = pixels.data.subarray(i, i + 3);
      pixels.data.fill(64 + (0.299 * red + 0.587 * green + 0.114 * blue) / 2, i, i + 3);
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  async function start() {
    find("question").textContent = data.question;
    find("answer").textContent = data.answer;
    fill(find("block"), [["mean of all", "all"], ...data.blocks.map((b, i) => [`block ${b}`, i])]);
    const heads = [...Array(data.heads).keys()].map((h) => [`head ${h + 1}`, h]);
    fill(find("head"), [["mean of all", "all"], ...heads]);
    fill(find("rows"), data.rows.map((words, i) => [words, i]));
    const share = find("share");
    share.max = data.rules[0].stops.length - 1;
    share.value = state.stop;
    share.addEventListener("input", () => {
      state.stop = Number(share.value);
      showStop();
    });
    find("reset").addEventListener("click", () => {
      share.value = state.stop = data.rules[0].chosen;
      showStop();
    });
    for (const id of ["block", "head", "rows"]) find(id).addEventListener("change", showAttention);
    for (const [number, picture] of data.pictures.entries()) {
      picture.image = new Image();
      picture.image.src = picture.source;
      await picture.image.decode();
      picture.grey = greyOf(picture.image);
      const grid = element("div", { className: "figures" });
      const least = picture.cols > 1.6 * picture.rows ? 32 : 19;
      grid.style.setProperty("--least", `${Math.max(least, 0.45 * picture.cols * side)}rem`);
      const section = element("section", {}, grid);
      find("pictures").append(section);
      const of = data.pictures.length > 1 ? `Picture ${number + 1}: ` : "";
      addFigure(grid, picture, null, `${of}Attention before pruning`);
      for (const rule of data.rules) addFigure(grid, picture, rule, `${of}${rule.name}`);
      addClassTokens(section, picture);
    }
    addUp();
    showStop();
    document.body.dataset.ready = "yes";
  }
  start();
})();
