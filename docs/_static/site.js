// The explorer in its frame: it has the theme of the page, and the page gives it its height.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const frame = document.querySelector("iframe.explorer");
  if (!frame) return;
  const tell = () => frame.contentWindow.postMessage({ theme: document.body.dataset.theme }, "*");
  frame.addEventListener("load", tell);
  new MutationObserver(tell).observe(document.body, { attributeFilter: ["data-theme"] });
  window.addEventListener("message", (event) => {
    if (event.source !== frame.contentWindow) return;
    frame.style.height = `${event.data.height}px`;
    tell();
  });
});
