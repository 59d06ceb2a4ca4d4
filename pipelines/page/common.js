// What every page of ours has: colours, where one is, the help dialog, keys. A page's own script comes after it and may add keys.
"use strict";
const kdcachePage = (() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  all(".tools, .choose").forEach((tool) => { tool.hidden = false; });

  // --- colours: system, light, dark; remembered where the browser lets a file remember
  const themes = ["auto", "light", "dark"];
  const words = { auto: "as the system has them", light: "light", dark: "dark" };
  const themeButton = one("#theme");
  const remember = (value) => { try { localStorage.setItem("kdcache-theme", value); } catch { /* private windows */ } };
  const remembered = () => { try { return localStorage.getItem("kdcache-theme"); } catch { return null; } };
  const setTheme = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
    themeButton.dataset.now = name;
    themeButton.textContent = name[0].toUpperCase() + name.slice(1);
    themeButton.setAttribute("aria-label", `Colours: ${words[name]}`);
  };
  const nextTheme = () => {
    const name = themes[(themes.indexOf(themeButton.dataset.now) + 1) % themes.length];
    setTheme(name);
    remember(name);
  };
  setTheme(themes.includes(remembered()) ? remembered() : "auto");
  themeButton.addEventListener("click", nextTheme);

  // --- where one is
  const links = new Map(all("nav.bar a").map((link) => [link.hash.slice(1), link]));
  const nav = one("nav.bar ul");
  const follow = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((found) => found.isIntersecting)) {
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.get(entry.target.id);
      link.setAttribute("aria-current", "true");
      nav.scrollLeft = link.offsetLeft - nav.clientWidth / 3;
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  all("main > section[id]").forEach((section) => { if (links.has(section.id)) follow.observe(section); });

  // --- keys
  const help = one("#help");
  one("#help-button").addEventListener("click", () => help.showModal());
  const keys = { t: nextTheme, "?": () => help.showModal() };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || one("dialog[open]")) return;
    if (event.key.startsWith("Arrow") && (event.target.matches("input[type=radio]") || event.target.closest(".scroll"))) return;
    if (keys[event.key]) {
      keys[event.key]();
      event.preventDefault();
    }
  });
  return { all, one, keys };
})();
