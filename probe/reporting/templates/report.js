"use strict";
(() => {
  // Every name is put in by textContent: nothing that a file or a class is called is ever read as markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows;
  if (!rows) return;
  const MOST = 60;

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function pictureOf(row) {
    const known = data.thumbs[row];
    if (known) return known;
    const shown = document.querySelector(`.gallery img[data-row="${row}"]`);
    return shown ? shown.src : null;
  }

  const percent = (row) => `${(rows.confidence[row] / 10).toFixed(1)} %`;

  function describe(row) {
    const answer = `${data.texts[rows.predicted[row]]} ${percent(row)}`;
    return rows.wrong[row] ? `${answer}, labelled ${data.texts[rows.label[row]]}` : answer;
  }

  function item(row) {
    const uri = pictureOf(row);
    const picture = uri
      ? make("img", { src: uri, alt: `${rows.name[row]}: ${describe(row)}`, width: 128, height: 128 })
      : make("div", { class: "no-picture", "aria-hidden": "true" });
    return make("li", { class: rows.wrong[row] ? "wrong" : "right" }, picture,
      make("p", {}, make("strong", {}, data.texts[rows.predicted[row]]), ` ${percent(row)}`),
      make("p", { class: "path" }, rows.name[row]));
  }

  function matrix(table) {
    const cell = document.getElementById("cell");
    table.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      for (const other of table.querySelectorAll("[aria-pressed]")) other.removeAttribute("aria-pressed");
      button.setAttribute("aria-pressed", "true");
      const label = Number(button.dataset.label), predicted = Number(button.dataset.predicted);
      const found = [];
      rows.label.forEach((of, row) => { if (of === label && rows.predicted[row] === predicted) found.push(row); });
      found.sort((a, b) => Boolean(pictureOf(b)) - Boolean(pictureOf(a)) || rows.confidence[b] - rows.confidence[a]);
      const shown = found.slice(0, MOST);
      const heading = `${data.texts[label]}, answered ${data.texts[predicted]}: ` +
        (shown.length < found.length ? `${shown.length} of ${found.length}` : `${found.length}`) +
        (found.length === 1 ? " image" : " images");
      cell.replaceChildren(make("h3", {}, heading), make("ul", { class: "gallery" }, ...shown.map(item)));
    });
    const orders = {
      name: (a, b) => a.dataset.class - b.dataset.class,
      errors: (a, b) => b.dataset.errors - a.dataset.errors || orders.name(a, b),
      size: (a, b) => b.dataset.size - a.dataset.size || orders.name(a, b),
    };
    document.getElementById("matrix-order").addEventListener("change", (event) => {
      const body = table.tBodies[0];
      const lines = [...body.rows].sort(orders[event.target.value]);
      const place = new Map(lines.map((line, i) => [line.dataset.class, i]));
      const byPlace = (a, b) => place.get(a.dataset.class) - place.get(b.dataset.class);
      for (const line of [table.tHead.rows[0], ...lines]) line.append(...[...line.querySelectorAll("[scope=col], td[data-class]")].sort(byPlace));
      body.append(...lines);
    });
  }

  function sortable(table) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = make("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const key = (line) => {
          const value = line.cells[column].dataset.value;
          return value === undefined ? line.cells[column].textContent : Number(value);
        };
        const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b);
        const lines = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)) * (rising ? 1 : -1));
        table.tBodies[0].append(...lines);
      });
    });
  }

  function map(canvas) {
    const tip = document.getElementById("tip"), legend = document.getElementById("map-legend");
    const said = document.getElementById("said"), box = canvas.parentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const LEGEND = 16, MARGIN = 14;
    const palette = { light: ["#1f5fbf", "#c2571a", "#2c7a4b", "#8e44ad", "#b3321f", "#00798c", "#8a6d00", "#5d626b"],
      dark: ["#84b3ff", "#ffb074", "#7fd19c", "#d3a4f0", "#ff9480", "#6fd3e0", "#e6cf6a", "#a2a7b0"] };
    const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    const [[lowX, highX], [lowY, highY]] = [extent(rows.x), extent(rows.y)];
    const spanX = highX - lowX || 1, spanY = highY - lowY || 1, middleX = (lowX + highX) / 2, middleY = (lowY + highY) / 2;
    let by = "label", at = -1, points = [];

    function colour(value) {
      const colours = dark.matches ? palette.dark : palette.light;
      if (by === "wrong") return value ? colours[4] : colours[7];
      if (data.texts.length <= colours.length) return colours[value];
      return `hsl(${(value * 137.508) % 360} 60% ${dark.matches ? 70 : 42}%)`;
    }

    function draw() {
      const size = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
      canvas.width = size.width * ratio;
      canvas.height = size.height * ratio;
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      const scale = Math.min((size.width - 2 * MARGIN) / spanX, (size.height - 2 * MARGIN) / spanY);
      points = rows.x.map((x, row) => [
        size.width / 2 + (x - middleX) * scale, size.height / 2 - (rows.y[row] - middleY) * scale]);
      const radius = rows.x.length > 3000 ? 1.8 : rows.x.length > 600 ? 2.5 : 3.5;
      const order = rows.x.map((_, row) => row).sort((a, b) => rows.wrong[a] - rows.wrong[b]);
      pen.globalAlpha = rows.x.length > 3000 ? 0.7 : 0.85;
      for (const row of order) {
        pen.fillStyle = colour(rows[by][row]);
        pen.beginPath();
        pen.arc(...points[row], by === "wrong" && rows.wrong[row] ? radius + 1 : radius, 0, 2 * Math.PI);
        pen.fill();
      }
      if (at >= 0) {
        pen.globalAlpha = 1;
        pen.lineWidth = 2;
        pen.strokeStyle = dark.matches ? "#fff" : "#000";
        pen.beginPath();
        pen.arc(...points[at], radius + 4, 0, 2 * Math.PI);
        pen.stroke();
      }
    }

    function explain() {
      const names = by === "wrong" ? ["right", "wrong"] : data.texts;
      const shown = names.slice(0, LEGEND).map((name, value) => {
        const dot = make("span", { class: "swatch" });
        dot.style.background = colour(value);
        return make("li", {}, dot, name);
      });
      if (names.length > LEGEND) shown.push(make("li", {}, `and ${names.length - LEGEND} more`));
      legend.replaceChildren(...shown);
    }

    function show(row) {
      if (row === at) return;
      at = row;
      draw();
      tip.hidden = row < 0;
      if (row < 0) return;
      const uri = pictureOf(row);
      tip.replaceChildren(...(uri ? [make("img", { src: uri, alt: "" })] : []),
        make("p", {}, describe(row)), make("p", { class: "path" }, rows.name[row]));
      const [x, y] = points[row], right = x > box.clientWidth / 2;
      tip.style.left = right ? "auto" : `${x + 12}px`;
      tip.style.right = right ? `${box.clientWidth - x + 12}px` : "auto";
      tip.style.top = `${Math.max(0, Math.min(y - 20, box.clientHeight - tip.offsetHeight))}px`;
    }

    function nearest(event) {
      const size = canvas.getBoundingClientRect();
      const x = event.clientX - size.left, y = event.clientY - size.top;
      let best = -1, distance = 16 ** 2;
      points.forEach(([px, py], row) => {
        const d = (px - x) ** 2 + (py - y) ** 2;
        if (d < distance) { best = row; distance = d; }
      });
      return best;
    }

    const wrong = rows.wrong.map((is, row) => is ? row : -1).filter((row) => row >= 0);
    canvas.addEventListener("pointermove", (event) => show(nearest(event)));
    canvas.addEventListener("pointerdown", (event) => show(nearest(event)));
    canvas.addEventListener("pointerleave", () => show(-1));
    canvas.addEventListener("blur", () => show(-1));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") show(-1);
      if (!step || !wrong.length) return;
      event.preventDefault();
      const here = wrong.indexOf(at);
      const next = here < 0 ? (step > 0 ? 0 : wrong.length - 1) : (here + step + wrong.length) % wrong.length;
      show(wrong[next]);
      said.textContent = `${rows.name[at]}: ${describe(at)}`;
    });
    for (const input of document.querySelectorAll("input[name=colour]")) {
      input.addEventListener("change", () => { by = input.value; draw(); explain(); });
    }
    dark.addEventListener("change", () => { draw(); explain(); });
    new ResizeObserver(draw).observe(canvas);
    explain();
  }

  const table = document.getElementById("matrix"), canvas = document.getElementById("canvas");
  if (table) matrix(table);
  if (canvas && rows.x) map(canvas);
  document.querySelectorAll("table.sortable").forEach(sortable);
})();
