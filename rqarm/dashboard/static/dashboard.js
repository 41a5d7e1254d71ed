/* Keeps the region #live up to date. All HTML comes escaped from the server; without this script the pages work too. */
(function () {
  "use strict";
  var live = document.getElementById("live");
  var state = document.getElementById("live-state");
  var announce = document.getElementById("announce");
  if (!live || !state || !live.dataset.stream) { return; }
  var source = null, timer = null, isDirty = false, isBusy = false, announced = live.dataset.announce || "";

  function show(word, text) {
    if (state.dataset.state !== word) { state.dataset.state = word; state.textContent = text; }
  }

  /* What the reader is in the middle of stays: an open detail, the focus, a selection, a half-filled form. */
  function isInUse() {
    var selection = document.getSelection();
    if (selection && !selection.isCollapsed && live.contains(selection.anchorNode)) { return true; }
    var active = document.activeElement;
    if (active && live.contains(active) && /^(INPUT|SELECT|TEXTAREA)$/.test(active.tagName)) { return true; }
    return Boolean(live.querySelector("details.sure[open]"));
  }

  function put(html) {
    if (isInUse()) { isDirty = true; return; }
    var page = new DOMParser().parseFromString(html, "text/html");
    var fresh = page.getElementById("live");
    if (!fresh) { return; }
    var active = document.activeElement;
    var name = active && live.contains(active) ? active.dataset.focus || active.getAttribute("href") : null;
    var before = Array.from(live.querySelectorAll("details[id]"));
    live.replaceChildren.apply(live, Array.from(fresh.childNodes));
    before.forEach(function (was) { var each = document.getElementById(was.id); if (each) { each.open = was.open; } });
    if (name) {
      var again = Array.from(live.querySelectorAll("a, button, summary")).find(function (each) {
        return (each.dataset.focus || each.getAttribute("href")) === name;
      });
      if (again) { again.focus({ preventScroll: true }); }
    }
    isDirty = false;
    var told = fresh.dataset.announce || "";
    if (told !== announced) { announced = told; announce.textContent = told; }
  }

  function refresh() {
    if (isBusy || document.hidden) { isDirty = true; return; }
    isBusy = true;
    fetch(location.href, { headers: { "X-Rqarm-Fragment": "live" }, credentials: "same-origin" })
      .then(function (response) { return response.ok ? response.text() : Promise.reject(response.status); })
      .then(put)
      .catch(function () { show("lost", "no connection"); })
      .finally(function () { isBusy = false; });
  }

  function connect() {
    if (source || document.hidden) { return; }
    source = new EventSource(live.dataset.stream);
    source.onopen = function () { show("live", "live"); };
    source.addEventListener("page", function (event) { show("live", "live"); put(JSON.parse(event.data)); });
    source.addEventListener("changed", function () { show("live", "live"); refresh(); });
    source.onerror = function () {
      var isOver = source && source.readyState === EventSource.CLOSED;
      show("lost", "no connection");
      if (isOver) {                       /* refused: too many watch already. Ask every few seconds instead. */
        disconnect();
        timer = setInterval(refresh, 5000);
      }
    };
  }

  function disconnect() {
    if (source) { source.close(); source = null; }
    if (timer) { clearInterval(timer); timer = null; }
  }

  document.addEventListener("visibilitychange", function () {
    if (document.hidden) { disconnect(); show("paused", "paused"); } else { refresh(); connect(); }
  });
  window.addEventListener("pagehide", disconnect);
  window.addEventListener("pageshow", function (event) { if (event.persisted) { refresh(); connect(); } });
  live.addEventListener("focusout", function () { if (isDirty) { setTimeout(refresh, 200); } });
  live.addEventListener("toggle", function () { if (isDirty) { refresh(); } }, true);
  connect();
})();
