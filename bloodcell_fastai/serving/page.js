"use strict";
// Without this file the page works too, as plain forms.

const upload = document.querySelector("#upload");
const files = upload.elements.files;
const status = document.querySelector("#status");
const bar = status.querySelector("progress");
const words = status.querySelector("span");
let request = new XMLHttpRequest();

/** Send a form; put the answers of the page that comes back in the place of those shown. */
function send(form, submitter) {
  request.abort();
  const answers = document.querySelector("#answers");
  request = new XMLHttpRequest();
  request.open("POST", form.action);
  request.responseType = "document";
  request.upload.onprogress = ({ loaded, total }) => say("Sending …", loaded / total);
  request.upload.onload = () => say("Predicting …");
  request.onerror = () => say(status.dataset.lost, 0);
  request.onload = () => {
    const shown = request.response?.querySelector("#answers");
    if (!shown) return request.onerror();
    answers.replaceChildren(...shown.childNodes);
    status.hidden = true;
    if (answers.getBoundingClientRect().top > innerHeight / 2) answers.scrollIntoView();
  };
  request.onloadend = () => answers.removeAttribute("aria-busy");
  request.send(new FormData(form, submitter));
  answers.setAttribute("aria-busy", "true");
  say("Sending …");
}

/** Show a text, with a bar from 0 to 1, one without end, or, at 0, none. */
function say(text, fraction) {
  words.textContent = text;
  bar.hidden = fraction === 0;
  if (fraction) bar.value = fraction;
  else bar.removeAttribute("value");
  status.hidden = false;
}

for (const form of document.forms) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form, event.submitter);
    form.reset(); // so that the same files can be chosen again
  });
}
files.addEventListener("change", () => upload.requestSubmit());

// Files may be dropped anywhere on the page.
addEventListener("dragover", (event) => {
  event.preventDefault();
  upload.classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget || upload.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  upload.classList.remove("over");
  if (event.dataTransfer.files.length) {
    files.files = event.dataTransfer.files;
    upload.requestSubmit();
  }
});
