"use strict";
(() => {
  // Every name is put in by textContent: nothing that a file or a class is called is ever read as markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const answers = document.getElementById("answers"), said = document.getElementById("said");
  const files = document.getElementById("files");
  const TOP = 5, PICTURE = 352, MOST_TRIES = 30;
  const waiting = [];
  let numRunning = 0;

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // Control characters and direction marks could make a name look like another one.
  const shown = (name) => name.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
  const percent = (p) => (p > 0.9995 && p < 1 ? "> 99.9 %" : p > 0 && p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
  const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  async function draw(file, box) {
    try {
      const picture = await createImageBitmap(file);
      const scale = Math.min(1, PICTURE / Math.max(picture.width, picture.height));
      const canvas = make("canvas", { "aria-hidden": "true" });
      canvas.width = Math.max(1, Math.round(picture.width * scale));
      canvas.height = Math.max(1, Math.round(picture.height * scale));
      const pen = canvas.getContext("2d");
      pen.imageSmoothingQuality = "high";
      pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
      picture.close();
      box.replaceChildren(canvas);
    } catch { /* a format that this browser does not show: the answer comes all the same */ }
  }

  async function ask(file) {
    if (file.size > data.max_bytes) return { error: { detail: `${file.size.toLocaleString("en")} bytes, and at most ${data.max_bytes.toLocaleString("en")} are read` } };
    for (let tries = 1; ; tries++) {
      let response;
      try {
        response = await fetch("/predict?thumbnails=true", { method: "POST", body: file, headers: { "content-type": "application/octet-stream" } });
        if (response.status !== 503 || tries === MOST_TRIES) return await response.json();
      } catch {
        return { error: { reason: "away", detail: "the server does not answer: does probe serve still run?" } };
      }
      await pause(Number(response.headers.get("retry-after")) || 1);
    }
  }

  function bars(answer) {
    const chosen = new Set([].concat(answer.predicted));
    const all = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
    const top = all.slice(0, Math.max(TOP, data.multi_label ? chosen.size : 0));
    const lines = top.map(([name, p]) => {
      const bar = make("div", { class: "bar" });
      bar.style.width = `${100 * p}%`;
      return make("li", chosen.has(name) ? { class: "chosen" } : {}, make("span", { class: "name", title: shown(name) }, shown(name)),
        make("div", { class: "track", "aria-hidden": "true" }, bar), make("span", { class: "value" }, percent(p)));
    });
    const rest = all.slice(top.length).reduce((sum, [, p]) => sum + p, 0);
    const more = all.length > top.length
      ? [make("p", { class: "rest" }, data.multi_label ? `and ${all.length - top.length} less likely classes` : `${all.length - top.length} other classes: ${percent(rest)} together`)] : [];
    return [make("ul", { class: "bars" }, ...lines), ...more];
  }

  function nearest(found) {
    if (!found.length) return [];
    const items = found.map((image) => {
      const label = image.labels.map(shown).join(", ") || "no label";
      const picture = image.thumbnail
        ? make("img", { src: image.thumbnail, alt: `${label}: ${shown(image.path)}`, title: shown(image.path), width: 128, height: 128 })
        : make("div", { class: "none", "aria-hidden": "true" });
      const path = image.thumbnail ? [] : [make("p", { class: "path" }, shown(image.path))];
      return make("li", {}, picture, make("p", { class: "label" }, make("span", {}, label),
        make("span", { class: "cosine" }, image.cosine.toFixed(2))), ...path);
    });
    return [make("p", { class: "nearest-heading" }, "Nearest training images, with their label and cosine"), make("ul", { class: "nearest" }, ...items)];
  }

  function tell(entry, file, answer) {
    entry.item.removeAttribute("aria-busy");
    if (!answer.predicted) {
      const why = answer.error, title = why.reason === "away" || why.reason === "busy" ? "No answer" : "Cannot be read";
      entry.item.className = "answer failed";
      entry.told.replaceChildren(make("h3", { class: "predicted" }, title), make("p", { class: "why" }, shown(why.detail)));
      said.textContent = `${shown(file.name)}: ${title.toLowerCase()}: ${shown(why.detail)}`;
      return;
    }
    const names = [].concat(answer.predicted).map(shown), text = names.join(", ") || "None of the classes";
    entry.item.className = "answer";
    const note = answer.trained_on ? [make("p", { class: "trained" }, "The classifier was trained on this very image.")] : [];
    entry.told.replaceChildren(make("h3", { class: "predicted" }, text), ...note, ...bars(answer), ...nearest(answer.nearest));
    said.textContent = `${shown(file.name)}: ${text}` + (data.multi_label ? "" : `, ${percent(answer.probabilities[answer.predicted])}`);
  }

  function next() {
    while (numRunning < data.at_once && waiting.length) {
      const { file, entry } = waiting.shift();
      numRunning++;
      draw(file, entry.picture);
      ask(file).then((answer) => tell(entry, file, answer)).finally(() => { numRunning--; next(); });
    }
  }

  function add(list) {
    const entries = [...list].map((file) => {
      const picture = make("div", { class: "picture" });
      const told = make("div", { class: "told" }, make("p", { class: "predicted" }, "Looking at it …"));
      const item = make("li", { class: "answer wait", "aria-busy": "true" },
        make("div", { class: "shown" }, picture, make("p", { class: "file" }, shown(file.name))), told);
      waiting.push({ file, entry: { item, picture, told } });
      return item;
    });
    answers.prepend(...entries);
    if (entries.length) document.body.classList.add("has-answers");
    next();
  }

  files.addEventListener("change", () => { add(files.files); files.value = ""; });
  document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) add(event.clipboardData.files); });
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    add(event.dataTransfer.files);
  });
})();
